"""The command from arguments to files and exit codes, against a small real server."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import zipfile

import grpc
import pytest
from google.rpc import error_details_pb2
from PIL import Image

from collage.v1 import blob_pb2, collage_pb2, collage_service_pb2_grpc
from collage.v1 import collage_service_pb2 as pb
from collage_client import files
from collage_client.cli import main
from collage_client.cli.options import dial
from collage_client.cli.progress import Progress
from tests.test_client import Service, refused, sha


def png(*rgb, size=(32, 16)):
    data = io.BytesIO()
    Image.new("RGB", size, rgb).save(data, "PNG")
    return data.getvalue()


COMPOSITE, MASK = png(10, 20, 30), png(255, 255, 255)
DIALS = {"noise": 0.5, "attract": 0.5, "repel": 0.5, "opacity": 1.0}


class Studio(Service):
    """Plans with one answer for every layer, and draws each seed as one colour."""

    def __init__(self):
        super().__init__()
        self.blobs = {sha(data): data for data in (COMPOSITE, MASK)}
        self.works = []
        self.submitted = asyncio.Event()
        self.stalls = False
        self.cut = []

    def planned(self, collage, sampling):
        used = collage_pb2.Sampling(model="mini", sampler="euler", steps=4, guidance_scale=5)
        used.MergeFrom(collage_pb2.Sampling(images=1, seed=1234))
        used.MergeFrom(sampling)
        layers = [
            collage_pb2.LayerPlan(
                name=layer.name,
                mask=blob_pb2.BlobRef(sha256=sha(MASK)),
                **{
                    name: getattr(layer, name) if layer.HasField(name) else automatic
                    for name, automatic in DIALS.items()
                },
            )
            for layer in collage.layers
        ]
        warning = collage_pb2.Warning(reason="LAYER_HIDDEN", field="collage.layers[0]", message="?")
        return pb.Plan(
            composite=blob_pb2.BlobRef(sha256=sha(COMPOSITE)),
            layers=layers,
            warnings=[warning],
            prompt=collage.prompt,
            sampling=used,
        )

    def drawn(self, plan, parent):
        images = []
        for index in range(plan.sampling.images):
            seed = plan.sampling.seed + index
            data = png(seed % 256, index, 0)
            self.blobs[sha(data)] = data
            images.append(
                pb.GeneratedImage(
                    index=index,
                    seed=seed,
                    blob=blob_pb2.BlobRef(sha256=sha(data)),
                    model_digest="d" * 64,
                    changed_pixels=7 if parent else None,
                )
            )
        return images

    def submit(self, work):
        self.works.append(work)
        self.submitted.set()
        parent = isinstance(work, pb.RedoWork)
        sampling = getattr(work, "sampling", collage_pb2.Sampling())
        self.plan = self.planned(work.collage, sampling)
        self.images = [] if isinstance(work, pb.LearnWork) else self.drawn(self.plan, parent)

    def events(self, job="jobs/a"):
        kinds = [
            {"queued": pb.Queued(position=2)},
            {"stage_started": pb.StageStarted(stage="generate", attempt=2)},
            *({"step": pb.Step(step=n, total=4)} for n in range(1, 5)),
            *({"image": image} for image in self.images),
            {"done": pb.Done(stage_seconds={"generate": 1.25})},
        ]
        # `queued` is no part of the log.
        return [pb.JobEvent(job=job, sequence=n, **kind) for n, kind in enumerate(kinds)]

    async def stream(self, context, answer, after):
        for event in self.events():
            if event.sequence > after or event.HasField("queued"):
                yield answer(event=event)
            if self.stalls:
                await asyncio.sleep(60)

    async def PlanCollage(self, request, context):
        for value, limit, field in (
            (request.sampling.steps, 1000, "sampling.steps"),
            (request.collage.layers[1].noise, 1, "collage.layers[1].noise"),
        ):
            if value > limit:
                wrong = error_details_pb2.BadRequest()
                wrong.field_violations.add(field=field, description=f"must be at most {limit}")
                await context.abort_with_status(refused(3, "one field is wrong", wrong))
        return pb.PlanCollageResponse(plan=self.planned(request.collage, request.sampling))

    async def CutOut(self, request, context):
        self.cut.append((self.blobs[request.image.blob.sha256], request.model))
        ref = blob_pb2.BlobRef(sha256=sha(COMPOSITE))
        return pb.CutOutResponse(image=blob_pb2.Image(blob=ref), model=request.model)

    async def GenerateImages(self, request, context):
        drawn = pb.GenerateWork(collage=request.collage, sampling=request.sampling)
        self.submit(request.redo if request.HasField("redo") else drawn)
        async for answer in self.stream(context, pb.GenerateImagesResponse, 0):
            yield answer

    async def CreateJob(self, request, context):
        self.submit(getattr(request, request.WhichOneof("work")))
        return pb.CreateJobResponse(job=pb.Job(name="jobs/a"))

    async def GetJob(self, request, context):
        job = pb.Job(name="jobs/a", state=3, attempts=2, plan=self.plan, images=self.images)
        job.create_time.FromMilliseconds(1000)
        job.start_time.FromMilliseconds(1500)
        job.end_time.FromMilliseconds(4000)
        return pb.GetJobResponse(job=job)

    async def ListJobs(self, request, context):
        return pb.ListJobsResponse(jobs=[pb.Job(name="jobs/a", state=3), pb.Job(name="jobs/bcd")])

    async def ListWords(self, request, context):
        return pb.ListWordsResponse()

    async def ListModels(self, request, context):
        model = pb.Model(
            name="mini",
            samplers=["euler", "ddim"],
            control_kinds=["canny", "pose"],
            drawn_control_kinds=["canny"],
        )
        return pb.ListModelsResponse(models=[model])


@pytest.fixture
async def studio():
    studio = Studio()
    server = grpc.aio.server()
    collage_service_pb2_grpc.add_CollageServiceServicer_to_server(studio, server)
    studio.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield studio
    await server.stop(None)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1, 2, 3))
    (tmp_path / "collage.yaml").write_text(
        "size: {width: 32, height: 16}\nprompt: a {one}\nlayers:\n"
        "  - {name: one, text: sushi, image: {path: a.png}, seed: 3}\n"
        "  - {name: two, text: rice, image: {path: a.png}, noise: 0}\n"
    )
    return tmp_path


@pytest.fixture
def collage(studio, capsys):
    async def run(*arguments):
        # What asks no server takes none.
        server = [] if arguments[0] == "convert" else ["--server", studio.address]
        code = await asyncio.to_thread(main, [*map(str, arguments), *server])
        out, err = capsys.readouterr()
        return code, out, err

    return run


async def test_generate_writes_a_folder_that_redo_takes_up(studio, collage, folder):
    out = folder / "out"
    code, printed, progress = await collage(
        "generate", folder, "--out", out, "--images", 2, "--seed", 0, "--guidance", 0
    )
    assert code == 0
    (work,) = studio.works
    assert work.sampling.HasField("seed")
    assert work.sampling.HasField("guidance_scale")
    assert not work.sampling.HasField("steps")
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    pictures = {"image-0.png", "image-1.png", "composite.png", "sheet.png"}
    masks = {"masks/one.png", "masks/two.png", "layers/one.png", "layers/two.png"}
    assert names == pictures | masks | {"collage.yaml", "result.json", ".collage.json"}
    assert (out / "image-1.png").read_bytes() == png(1, 1, 0)
    told = json.loads((out / "result.json").read_text())
    assert [image["seed"] for image in told["images"]] == [0, 1]
    assert told["images"][1]["sha256"] == sha(png(1, 1, 0))
    assert [layer["noise"] for layer in told["layers"]] == [0.5, 0]
    assert told["model_digest"] == "d" * 64
    assert told["timings_s"] == {"queued": 0.5, "total": 3.0, "stages": {"generate": 1.25}}
    assert told["request"] == {
        "kind": "generate",
        "sampling": {"images": 2, "seed": "0", "guidance_scale": 0.0},
    }
    assert printed.splitlines()[-1] == f"  {out / 'result.json'}"
    assert "LAYER_HIDDEN" in printed
    assert "queued, 2 jobs ahead" in progress
    assert "generate, attempt 2" in progress
    assert "step 2 of 4" in progress

    again = folder / "again"
    code, printed, _ = await collage(
        "redo", out, "--layer", "one", "--noise", 0.25, "--image", 1, "--out", again
    )
    assert code == 0
    redo = studio.works[-1]
    assert studio.blobs[redo.parent.blob.sha256] == png(1, 1, 0)
    assert list(redo.layers) == ["one"]
    assert redo.collage.layers[0].noise == 0.25
    assert not redo.collage.layers[0].HasField("seed")
    assert redo.collage.layers[1].HasField("noise")
    assert not redo.sampling.HasField("seed")
    assert (redo.sampling.steps, redo.sampling.sampler, redo.sampling.images) == (4, "euler", 1)
    assert "7 pixels changed" in printed
    told = json.loads((again / "result.json").read_text())
    assert told["images"][0]["changed_pixels"] == 7
    assert told["request"]["layers"] == ["one"]
    third = folder / "third"
    assert (await collage("redo", again, "--layer", "two", "--out", third))[0] == 0


async def test_a_second_result_in_the_same_folder_leaves_nothing_of_the_first(collage, folder):
    out = folder / "out"
    await collage("generate", folder, "--out", out, "--images", 3)
    assert (await collage("generate", folder, "--out", out))[0] == 0
    assert [path.name for path in out.glob("image-*.png")] == ["image-0.png"]


async def test_redo_takes_every_dial_of_its_own_and_of_sampling(studio, collage, folder):
    await collage("generate", folder, "--out", folder / "out", "--adapter", "ink=0.5")
    words = (
        "redo {}/out --layer one --out {}/two --feather 0 --restore-cutout --steps 3 --guidance 2"
    )
    code, _, _ = await collage(*words.replace("{}", str(folder)).split(), "--adapter", "ink=1.5")
    assert code == 0
    redo = studio.works[-1]
    assert redo.HasField("feather") and redo.feather == 0
    assert redo.restore_cutout
    assert (redo.sampling.steps, redo.sampling.guidance_scale) == (3, 2)
    assert [adapter.weight for adapter in redo.sampling.adapters] == [1.5]


async def test_json_is_all_that_standard_output_holds(studio, collage, folder):
    out = folder / "out"
    (folder / "photo.png").write_bytes(png(1, 2, 3))
    code, printed, progress = await collage("generate", folder, "--out", out, "--json")
    told = json.loads(printed)
    assert code == 0
    assert told["job"] == "jobs/a"
    assert told["files"][-1] == str(out / "result.json")
    assert "step 2 of 4" in progress
    for words, key in (
        (["plan", folder, "--out", folder / "p"], "prompt"),
        (["redo", out, "--layer", "one", "--out", folder / "r"], "images"),
        (
            ["sweep", folder, "--layer", "two", "--dial", "noise=0:1:2", "--out", folder / "s"],
            "values",
        ),
        (["learn", folder, "--layer", "one"], "words"),
        (["cutout", folder / "photo.png"], "files"),
        (["jobs"], "jobs"),
        (["words"], "words"),
        (["words", "list"], "words"),
        (["models"], "models"),
        (["job", "show", "jobs/a"], "name"),
        (["job", "cancel", "a"], "name"),
    ):
        code, printed, _ = await collage(*words, "--json")
        assert (code, key in json.loads(printed)) == (0, True), words
    code, printed, _ = await collage(
        "plan", folder, "--steps", 2000, "--out", folder / "x", "--json"
    )
    assert code == 2
    wrong = json.loads(printed)["error"]
    assert wrong["field_violations"][0]["field"] == "sampling.steps"
    assert wrong["code"] == "INVALID_ARGUMENT"


async def test_quiet_says_results_and_errors_only(collage, folder):
    code, printed, progress = await collage("generate", folder, "--out", folder / "o", "--quiet")
    assert (code, progress) == (0, "")
    assert "result.json" in printed
    assert "collage: bad input" in (await collage("plan", folder, "--out", folder, "--quiet"))[2]


async def test_a_job_is_shown_watched_fetched_and_cancelled_by_its_name(studio, collage, folder):
    await collage("generate", folder, "--out", folder / "out", "--images", 2)
    code, printed, _ = await collage("job", "show", "jobs/a")
    assert code == 0
    assert "done" in printed and "seed 1235" in printed and "LAYER_HIDDEN" in printed
    code, printed, progress = await collage("job", "watch", "a")
    assert code == 0
    assert "step 2 of 4" in progress and "jobs/a done: generate 1.25 s" in printed
    code, printed, _ = await collage("job", "watch", "a", "--json")
    events = [json.loads(line) for line in printed.splitlines()]
    assert [*events[-1]["done"]["stage_seconds"]] == ["generate"]
    assert len(events) == 9
    again = folder / "again"
    code, _, _ = await collage("job", "fetch", "jobs/a", "--out", again)
    assert code == 0
    first, second = (json.loads((folder / n / "result.json").read_text()) for n in ("out", "again"))
    assert first.pop("request") and first == second
    assert (again / "image-1.png").read_bytes() == (folder / "out" / "image-1.png").read_bytes()
    assert (await collage("job", "cancel", "jobs/a"))[0] == 0
    assert [request.name for request in studio.called("CancelJob")] == ["jobs/a"]


async def test_a_cut_out_is_written_beside_its_photograph_or_where_it_is_told(
    collage, studio, tmp_path
):
    photo = tmp_path / "cup.of.tea.png"
    photo.write_bytes(png(1, 2, 3))
    code, printed, _ = await collage("cutout", photo)
    assert (code, printed.split()) == (0, ["wrote", str(tmp_path / "cup.of.tea-cutout.png")])
    assert (tmp_path / "cup.of.tea-cutout.png").read_bytes() == COMPOSITE
    code, _, _ = await collage("cutout", photo, "--out", tmp_path / "x" / "y.png", "--model", "m")
    assert (tmp_path / "x" / "y.png").read_bytes() == COMPOSITE
    assert studio.cut == [(png(1, 2, 3), ""), (png(1, 2, 3), "m")]
    code, _, told = await collage("cutout", tmp_path / "none.png")
    assert code == 2 and "none.png" in told


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("collage 0.")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("collage ", {"generate", "job", "words", "completion"}),
        ("collage gen", {"generate"}),
        ("collage redo --fea", {"--feather"}),
        ("collage job ", {"show", "watch", "fetch", "cancel"}),
        ("collage job watch --j", {"--json"}),
        ("collage completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_bash_completes_commands_and_options(typed, offered, capsys):
    assert main(["completion", "bash"]) == 0
    words = typed.split(" ")
    program = (
        f"{capsys.readouterr().out}\nCOMP_WORDS=({' '.join(words[:-1])} '{words[-1]}')\n"
        f'COMP_CWORD={len(words) - 1}\n_collage\necho "${{COMPREPLY[*]}}"'
    )
    ran = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=20)
    assert ran.stderr == ""
    assert offered <= set(ran.stdout.split())


def test_zsh_and_fish_have_scripts_too(capsys):
    main(["completion", "zsh"])
    assert "bashcompinit" in capsys.readouterr().out
    main(["completion", "fish"])
    lines = capsys.readouterr().out.splitlines()
    assert any("__fish_seen_subcommand_from redo" in line and "feather" in line for line in lines)


async def test_a_collage_may_be_a_file_of_another_tool(collage, folder, studio):
    code, out, err = await collage("convert", folder, folder / "a.ora")
    assert (code, out.strip()) == (0, str(folder / "a.ora")), err
    code, _, err = await collage("generate", folder / "a.ora", "--out", folder / "out")
    assert code == 0, err
    direct = files.load(folder)
    (work,) = studio.works
    for layer, was in zip(work.collage.layers, direct.layers, strict=True):
        assert (layer.name, layer.text, layer.transform) == (was.name, was.text, was.transform)
    code, _, err = await collage(
        "generate", folder / "a.ora", "--size", "64x64", "--out", folder / "large"
    )
    assert code == 0, err
    assert (studio.works[1].collage.size.width, studio.works[1].collage.size.height) == (64, 64)
    assert studio.works[1].collage.layers[0].transform.scale == 2
    # The picture drawn of it is its top layer.
    code, _, err = await collage("convert", folder / "out", folder / "b.ora")
    assert code == 0, err
    with zipfile.ZipFile(folder / "b.ora") as opened:
        assert opened.read("data/result.png") == (folder / "out" / "image-0.png").read_bytes()


async def test_what_opens_files_is_named_where_it_is_missing(collage, folder, monkeypatch):
    (folder / "a.psd").write_bytes(b"8BPS")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = await collage("plan", folder / "a.psd", "--out", folder / "out")
    assert code == 1
    assert "psd_tools is not installed: install collage-diffusion[files] [NOT_INSTALLED]" in err


async def test_converting_writes_over_nothing_unasked(collage, folder):
    (folder / "a.psd").write_text("mine")
    code, _, err = await collage("convert", folder, folder / "a.psd")
    assert (code, "--force" in err) == (2, True)
    assert (folder / "a.psd").read_text() == "mine"
    code, _, err = await collage("convert", folder, folder / "a.xcf")
    assert (code, "allowed: .ora, .psd, .zip" in err) == (2, True)
    assert (await collage("convert", folder, folder / "a.psd", "--force"))[0] == 0
    code, out, err = await collage("convert", folder / "a.psd", folder / "new", "--json")
    assert code == 0, err
    assert json.loads(out)["layers"] == [layer.name for layer in files.load(folder).layers]
    assert [layer.name for layer in files.load(folder / "new").layers] == json.loads(out)["layers"]
    (folder / "a.ora").write_bytes(b"PK\3\4 and no more")
    code, _, err = await collage("plan", folder / "a.ora", "--out", folder / "out")
    assert (code, "file: is a zip file without its list of entries" in err) == (2, True)


async def test_only_what_a_result_wrote_is_deleted(collage, folder):
    out = folder / "out"
    out.mkdir()
    foreign = {
        "package.json": "{}",
        "notes.json": "mine",
        "plan.json": "{}",
        "masks/mine.png": "?",
        "layers/mine.psd": "?",
    }
    for name in foreign:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(foreign[name])
    # A plan.json of another tool makes no folder ours.
    code, _, err = await collage("generate", folder, "--out", out)
    assert code == 2
    assert "holds other things" in err
    assert {name: (out / name).read_text() for name in foreign} == foreign

    mine = folder / "mine"
    assert (await collage("generate", folder, "--out", mine, "--images", 2))[0] == 0
    for name in ("package.json", "notes.md"):
        (mine / name).write_text("kept")
    assert (await collage("generate", folder, "--out", mine))[0] == 0
    assert (mine / "package.json").read_text() == (mine / "notes.md").read_text() == "kept"
    assert not (mine / "image-1.png").exists()
    # Of a result's name, and not of a result.
    (mine / "masks" / "three.png").write_text("kept")
    code, _, err = await collage("generate", folder, "--out", mine)
    assert code == 2
    assert "masks/three.png is not of an earlier result" in err
    assert (mine / "masks" / "three.png").read_text() == "kept"


async def test_links_in_a_results_folder_lead_nowhere(collage, folder):
    out, elsewhere = folder / "out", folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "one.png").write_text("kept")
    (folder / "victim").write_text("kept")
    out.mkdir()
    mark = out / ".collage.json"
    mark.write_text(json.dumps({"files": ["masks/one.png"]}))
    (out / "masks").symlink_to(elsewhere)
    code, _, err = await collage("plan", folder, "--out", out)
    assert code == 2
    assert "masks leads elsewhere" in err
    (out / "masks").unlink()
    (out / ".collage.draft").symlink_to(folder / "victim")
    assert (await collage("plan", folder, "--out", out))[0] == 0
    assert (elsewhere / "one.png").read_text() == (folder / "victim").read_text() == "kept"
    mark.unlink()
    os.mkfifo(mark)
    assert (await collage("plan", folder, "--out", out))[0] == 2


async def test_a_list_that_names_other_places_deletes_nothing_there(collage, folder):
    out = folder / "out"
    await collage("generate", folder, "--out", out)
    (folder / "victim.json").write_text("kept")
    mark = out / ".collage.json"
    mark.write_text(json.dumps({"files": ["../victim.json", "../a.png", "result.json"]}))
    for name in ("image-0.png", "composite.png", "sheet.png", "collage.yaml"):
        (out / name).unlink()
    for part in ("masks", "layers"):
        for file in (out / part).iterdir():
            file.unlink()
    assert (await collage("generate", folder, "--out", out))[0] == 0
    assert (folder / "victim.json").read_text() == "kept"
    assert (folder / "a.png").exists()


async def test_plan_writes_what_is_known_without_drawing(studio, collage, folder):
    out = folder / "plan"
    code, printed, _ = await collage("plan", folder / "collage.yaml", "--out", out)
    assert code == 0
    assert not studio.works
    told = json.loads((out / "plan.json").read_text())
    assert told["layers"][1]["noise"] == 0
    assert (out / "masks" / "two.png").read_bytes() == MASK
    assert files.attach(files.load(out)) == files.attach(files.load(folder))
    assert printed.splitlines()[-1].endswith("plan.json")


async def test_a_sweep_moves_one_dial_under_one_seed(studio, collage, folder):
    out = folder / "sweep"
    code, _, _ = await collage(
        "sweep", folder, "--layer", "two", "--dial", "noise=0:1:3", "--out", out, "--images", 2
    )
    assert code == 0
    assert [work.collage.layers[1].noise for work in studio.works] == [0, 0.5, 1]
    assert {work.sampling.seed for work in studio.works} == {1234}
    assert not studio.works[0].collage.layers[0].HasField("noise")
    told = json.loads((out / "sweep.json").read_text())
    assert [part["value"] for part in told["values"]] == [0, 0.5, 1]
    assert all((out / part["result"]).is_file() for part in told["values"])
    with Image.open(out / "sheet.png") as sheet:
        # Two seeds by composite and three values, each tile 256 x 128.
        assert (sheet.width // 256, sheet.height // 128) == (4, 2)


async def test_lists_are_printed(collage):
    code, out, _ = await collage("jobs")
    assert code == 0
    assert out.splitlines()[1].split()[:2] == ["jobs/a", "done"]
    assert "no words yet" in (await collage("words"))[1]
    models = (await collage("models"))[1]
    assert "euler, ddim" in models and "canny (drawn), pose (needs an image)" in models


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["plan", "{}", "--steps", 2000, "--out", "{}/x"], "sampling.steps: must be at most 1000"),
        (["plan", "{}", "--steps", 2**40, "--out", "{}/x"], "--steps: 1099511627776 is out of"),
        (
            ["plan", "{}", "--seed", -1, "--out", "{}/x"],
            "--seed: -1 is out of range; leave it out for a drawn one",
        ),
        (["plan", "{}/none", "--out", "{}/x"], "none: No such file"),
        (["plan", "{}", "--out", "{}"], "--out: "),
        (["redo", "{}", "--layer", "one", "--out", "{}/x"], "DIR: "),
        (
            ["learn", "{}", "--layer", "three"],
            "--layer: no layer 'three'; this collage has one, two",
        ),
    ],
)
async def test_bad_input_exits_2_and_names_the_field(collage, folder, arguments, named):
    filled = [str(argument).replace("{}", str(folder)) for argument in arguments]
    code, out, err = await collage(*filled)
    assert (code, out) == (2, "")
    assert named in err
    assert "Traceback" not in err


async def test_a_field_the_server_refuses_is_found_in_the_file(collage, folder):
    file = folder / "collage.yaml"
    file.write_text(file.read_text().replace("noise: 0", "\n      noise: 1.5"))
    code, _, err = await collage("plan", folder, "--out", folder / "x")
    assert code == 2
    assert f"  collage.layers[1].noise: must be at most 1 ({file}, line 6)" in err.splitlines()


async def test_a_server_that_is_not_there_exits_1(capsys):
    arguments = ["jobs", "--server", "127.0.0.1:1"]
    assert await asyncio.to_thread(main, arguments) == 1
    assert "[UNAVAILABLE]" in capsys.readouterr().err


async def test_an_interrupt_cancels_the_job_and_exits_130(studio, folder):
    studio.stalls = True
    arguments = ["generate", folder, "--out", folder / "out", "--server", studio.address]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "collage_client.cli", *map(str, arguments)),
        stderr=-1,
        # A shell that runs these tests in the background has its children ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    await asyncio.wait_for(studio.submitted.wait(), timeout=20)
    await asyncio.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), timeout=20)
    assert process.returncode == 130
    assert [request.name for request in studio.called("CancelJob")] == ["jobs/a"]
    assert b"cancelled jobs/a" in err
    assert b"Traceback" not in err


def test_a_dial_names_its_values():
    assert dial("noise=0:1:5") == ("noise", [0, 0.25, 0.5, 0.75, 1])
    assert dial("repel=1:0:2") == ("repel", [1, 0])


@pytest.mark.parametrize("text", ["noise", "noise=0:1", "nose=0:1:3", "noise=0:2:3", "noise=0:1:1"])
def test_a_dial_that_is_none_is_refused_with_exit_2(text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "x", "--layer", "a", "--dial", text, "--out", "y"])
    assert caught.value.code == 2
    assert "--dial" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["", "generate", "plan", "redo", "sweep", "learn", "serve", "cluster"]
)
def test_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*filter(None, [command]), "-h"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out) > 300


def test_progress_moves_one_line_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    progress = Progress(terminal, "noise 0.5")
    for step in range(1, 5):
        progress.show(pb.JobEvent(step=pb.Step(step=step, total=4)))
    progress.close()
    lines = terminal.getvalue().split("\r\x1b[2K")
    assert "noise 0.5" in lines[2]
    assert "####" in lines[4]
    assert max(map(len, lines)) == 39, "a line that wraps cannot be erased"
    assert lines[-1] == ""
    assert "\n" not in terminal.getvalue()
