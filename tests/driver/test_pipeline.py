"""Tiny devices end to end: a run, a resumed run, a killed run, the report, the models it leaves."""

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepfusion import cli, pipeline
from deepfusion import config as configuration
from deepfusion.config import Config

ROOT = Path(__file__).parents[2]
TINY = (
    "data.made_entities=12",
    "data.context_length=64",
    "data.vocab_size=320",
    "data.partition='random'",
    "federation.num_devices=4",
    "federation.min_devices=3",
    "devices.architectures=['gpt2','qwen2']",
    "devices.steps=3",
    "devices.init_steps=2",
    "devices.batch_size=2",
    "base.steps=3",
    "base.batch_size=2",
    "cluster.num_clusters=2",
    "distill.steps=3",
    "distill.batch_size=2",
    "distill.vaa_warmup_steps=1",
    "distill.vaa_dim=16",
    "distill.vaa_heads=1",
    "distill.checkpoint_steps=1",
    "tune.steps=3",
    "tune.batch_size=2",
    "tune.checkpoint_steps=1",
    "evaluate.max_tokens=512",
)


def tiny(folder: Path, *more: str) -> Config:
    file = folder.parent / f"{folder.name}.toml"
    file.write_text("")
    return configuration.load(file, [*TINY, f"run.output='{folder}'", *more])


def scores(folder: Path) -> dict[str, float]:
    models = json.loads((folder / "evaluation.json").read_text())["models"]
    return {name: one["nll"] for name, one in models.items()}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    pipeline.run(tiny(folder))
    return folder


def test_run_leaves_what_it_promises(whole_run: Path) -> None:
    for name in (
        "base/model.safetensors",
        "global_moe/model.safetensors",
        "global_moe/tokenizer.json",
        "metrics.jsonl",
        "ledger.csv",
        "ledger.json",
        "audit.jsonl",
        "config.toml",
        "clusters.json",
        "evaluation.json",
        "report.md",
        "report.html",
    ):
        assert (whole_run / name).stat().st_size > 0, name
    found = scores(whole_run)
    wanted = {"base", "mean model", "merged, not tuned", "moe", "dense control", "centralised twin"}
    assert wanted <= found.keys()
    assert sum(name.startswith("device-") for name in found) == 4
    assert sum(name.startswith("proxy ") for name in found) == 2
    assert sum(name.startswith("M ") for name in found) == 2


def test_ledger_equals_the_files(whole_run: Path) -> None:
    ledger = json.loads((whole_run / "ledger.json").read_text())
    for folder in (whole_run / "uploads").iterdir():
        sent = sum(path.stat().st_size for path in folder.iterdir())
        assert ledger["devices"][folder.name]["bytes_up"] == sent
    assert ledger["baselines"]


def test_report_names_every_model_and_is_one_file(whole_run: Path) -> None:
    page = (whole_run / "report.html").read_text()
    for name in scores(whole_run):
        assert name in page
    for heading in ("Perplexity", "Fact recall", "Expert load", "Communication", "Privacy"):
        assert f"<h2>{heading}</h2>" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "no differential privacy" in page
    assert "What was not checked" in page


def test_second_run_does_nothing_again(whole_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole_run.rglob("*.safetensors")}
    pipeline.run(tiny(whole_run))
    assert before == {path: path.stat().st_mtime_ns for path in whole_run.rglob("*.safetensors")}


def test_folder_refuses_another_configuration(whole_run: Path) -> None:
    with pytest.raises(ValueError, match="belongs to configuration"):
        pipeline.run(tiny(whole_run, "run.seed=8"))


@pytest.mark.slow
def test_models_load_without_our_packages(whole_run: Path) -> None:
    code = """
import sys
sys.modules["deepfusion"] = sys.modules["deepfusion_kernels"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
for name in ("base", "global_moe"):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/" + name)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] + "/" + name)
    out = model.generate(**tokenizer("Question: ", return_tensors="pt"), max_new_tokens=3)
    print(type(model).__name__, out.shape[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(whole_run)], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert "Qwen2ForCausalLM" in done.stdout
    assert "Qwen2MoeForCausalLM" in done.stdout


@pytest.mark.slow
def test_killed_in_every_stage_ends_in_the_same_models(whole_run: Path, tmp_path: Path) -> None:
    """kill -9 again and again at growing times, run again each time: same bits as uninterrupted."""
    folder = tmp_path / "run"
    file = tmp_path / "run.toml"
    file.write_text("")
    arguments = [a for item in (*TINY, f"run.output='{folder}'") for a in ("--set", item)]
    # forks of a process that has imported everything and computed nothing
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["deepfusion.pipeline"])
    kills = 0
    for _ in range(60):
        process = forks.Process(target=_command_line, args=(["run", str(file), *arguments],))
        process.start()
        finished_before = _progress(folder)
        while process.is_alive() and _progress(folder) < finished_before + 2:
            time.sleep(0.01)
        if not process.is_alive():
            assert process.exitcode == 0
            break
        process.kill()
        process.join()
        kills += 1
    else:
        pytest.fail("the run never ended")
    assert kills >= 3
    assert scores(folder) == scores(whole_run)
    for name in ("base", "global_moe"):
        file_of = f"{name}/model.safetensors"
        assert (folder / file_of).read_bytes() == (whole_run / file_of).read_bytes(), name


def _command_line(words: list[str]) -> None:
    sys.exit(cli.main(words))


def _progress(folder: Path) -> int:
    return len(list((folder / "stages").glob("*.json"))) if folder.exists() else 0


@pytest.mark.parametrize("recipe", ["paper", "direct"])
def test_other_recipes_run(tmp_path: Path, recipe: str) -> None:
    folder = tmp_path / recipe
    switched_off = ("controls.dense=false", "controls.centralised=false")
    pipeline.run(tiny(folder, f"run.recipe='{recipe}'", *switched_off))
    found = scores(folder)
    assert "moe" in found
    assert any(name.startswith("M ") for name in found) == (recipe == "paper")


def test_reference_kernels_give_the_same_losses(tmp_path: Path) -> None:
    """run.kernels = 'reference' is the same mathematics: losses agree to float32 rounding.

    AdamW at a low rate: Muon divides small gradients by their own size, rounding with them.
    """
    tables = ("devices", "base", "distill", "tune")
    calm = [f"{table}.optimizer='adamw'" for table in tables] + [f"{t}.lr=0.0003" for t in tables]
    found = {}
    for kernels in ("auto", "reference"):
        folder = tmp_path / kernels
        pipeline.run(tiny(folder, f"run.kernels='{kernels}'", *calm))
        found[kernels] = scores(folder)
    for name, nll in found["reference"].items():
        assert found["auto"][name] == pytest.approx(nll, rel=2e-5), name


KEPT = ("upload.kind='logprobs'", "upload.top_k=4", "distill.feature_loss='none'")
TWO = ("federation.num_devices=2", "federation.min_devices=2", "devices.architectures=['gpt2']")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("devices.adapter_rank=2", "devices.dp_noise=1.0", "evaluate.canaries=2"),
        (*KEPT, "upload.public_sequences=24"),
        (*KEPT, "run.recipe='direct'", "devices.adapter_rank=2"),
    ],
    ids=["adapter", "logprobs", "logprobs-direct-adapter"],
)
def test_other_uploads_run(tmp_path: Path, more: tuple[str, ...]) -> None:
    """From devices that send no whole model to a mixture, with every byte in the ledger."""
    folder = tmp_path / "run"
    pipeline.run(tiny(folder, *TWO, "data.made_entities=8", *more, "controls.centralised=false"))
    found = scores(folder)
    has_models = "upload.kind='logprobs'" not in more
    assert any(name.startswith("device-") for name in found) == has_models
    assert 0 < found["moe"] < 10
    ledger = json.loads((folder / "ledger.json").read_text())
    kinds = {row["kind"] for row in ledger["transfers"]}
    assert kinds >= ({"adapter"} if has_models else {"logprobs", "public"})
    assert "model" not in kinds
    for upload in (folder / "uploads").iterdir():
        sent = sum(path.stat().st_size for path in upload.iterdir())
        assert ledger["devices"][upload.name]["bytes_up"] == sent
    assert any("FedMKT logits, top 4" in name for name in ledger["baselines"]) != has_models
    page = (folder / "report.md").read_text()
    assert ("no differential privacy" in page) != has_models
    assert ("DP-SGD on 2 of 2 devices: epsilon at most" in page) == has_models
    assert ("Planted secrets" in page) == has_models
    if has_models:
        told = json.loads((folder / "canaries.json").read_text())
        assert {row.split()[0] for row in told["exposure"]} == {
            "base,",
            "upload",
            "proxy",
            "mixture",
        }
        assert all(len(values) == 2 for values in told["exposure"].values())
    if not has_models:
        assert "sent log-probabilities and no models" in (folder / "report.md").read_text()
