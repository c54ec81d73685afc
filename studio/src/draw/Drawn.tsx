import { useEffect, useState } from "react"
import { pictureBlob } from "../pictures"
import { blobUrl } from "../server"

/** A drawn picture by its digest: from the server, and from what is kept here where that does not answer. */
export function Drawn({ digest, alt }: { digest: string; alt: string }) {
  const [kept, setKept] = useState<string>()
  useEffect(() => () => (kept ? URL.revokeObjectURL(kept) : undefined), [kept])
  const fall = () => {
    if (kept) return
    void pictureBlob(digest).then((blob) => blob && setKept(URL.createObjectURL(blob)))
  }
  return <img src={kept ?? blobUrl(digest)} alt={alt} draggable={false} onError={fall} />
}
