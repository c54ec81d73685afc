// The models that the server has, asked for once and again until it answers.

import { create } from "zustand"
import type { CutOutModel } from "./gen/collage/v1/collage_pb"
import type { Model } from "./gen/collage/v1/collage_service_pb"
import { service } from "./server"
import { useStudio } from "./store"

interface Models {
  /** The server's default first. Empty until it answered. */
  readonly models: readonly Model[]
  /** What cuts objects out, the default first. */
  readonly cutOutModels: readonly CutOutModel[]
}

export const useModels = create<Models>()(() => ({ models: [], cutOutModels: [] }))

const AGAIN_MS = 2000

export async function loadModels(): Promise<readonly Model[]> {
  const models: Model[] = []
  let cutOutModels: readonly CutOutModel[] = []
  for (let pageToken = ""; ; ) {
    const page = await service.listModels({ pageSize: 100, pageToken })
    models.push(...page.models)
    cutOutModels = page.cutOutModels
    pageToken = page.nextPageToken
    if (!pageToken) break
  }
  useModels.setState({ models, cutOutModels })
  return models
}

export async function awaitModels(): Promise<void> {
  for (;;) {
    try {
      await loadModels()
      return
    } catch {
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS))
    }
  }
}

/** The model that a document is drawn with. */
export function modelNamed(models: readonly Model[], name: string): Model | undefined {
  return name ? models.find((model) => model.name === name) : models[0]
}

export function useModel(): Model | undefined {
  const name = useStudio((state) => state.document.sampling.model)
  return useModels(({ models }) => modelNamed(models, name))
}
