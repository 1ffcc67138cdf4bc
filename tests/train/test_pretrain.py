"""A whole tiny run: it learns, resumes bit for bit, and exports what other tools load."""

from __future__ import annotations

import itertools
import json
import signal
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tuili.base.errors import ConfigError
from tuili.base.hardware import Hardware
from tuili.layers.decoder import Decoder
from tuili.models.checkpoint import open_checkpoint
from tuili.models.weights import load_model
from tuili.train import card, checkpoint, pretrain
from tuili.train.batch import TrainBatch
from tuili.train.checkpoint import Progress
from tuili.train.data import Stories
from tuili.train.export import model_spec
from tuili.train.loop import StepReport
from tuili.train.recipe import Recipe, ReportRecipe
from tuili.train.report import Reporter
from tuili.train.results import measure
from tuili.train.run import CHECKPOINT, Diverged, TrainingRun, dtype_of, open_run, prepared


@pytest.fixture(scope="module")
def finished(archive: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    torch.set_num_threads(1)
    run = open_run(recipe, archive, tmp_path_factory.mktemp("run"), "cpu", False)
    pretrain.complete(run)
    return run


def test_it_learns(finished: TrainingRun) -> None:
    steps = [json.loads(line) for line in (finished.out / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [*range(1, 9), 8]
    assert steps[0]["loss"] == pytest.approx(torch.tensor(400.0).log().item(), abs=0.3)
    assert steps[-1]["held_out_loss"] < steps[0]["loss"] - 1
    results = json.loads((finished.out / "model" / "results.json").read_text())
    assert results["loss_per_token"] == steps[-1]["held_out_loss"]
    assert results["raw"]["loss_per_token"] == steps[-1]["held_out_raw_loss"]
    assert results["raw"]["held_out_tokens"] != results["held_out_tokens"]
    assert results["tokens"] == steps[-2]["tokens"]


@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(
    finished: TrainingRun, archive: Path, recipe: Recipe, tmp_path: Path, stop: int
) -> None:
    first = open_run(recipe, archive, tmp_path, "cpu", False)
    with prepared(first.device):
        for _ in range(stop):
            first.step()
    first.save()
    resumed = open_run(recipe, archive, tmp_path, "cpu", True)
    with Reporter(tmp_path, 1) as reporter:
        pretrain.train(resumed, reporter)
    states = [load_file(run.out / CHECKPOINT) for run in (finished, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    progress = [replace(run.progress, seconds=0.0) for run in (finished, resumed)]
    assert progress[0] == progress[1]


class Interrupting(Reporter):
    """Presses Ctrl-C during the third step."""

    def step(self, progress: Progress, report: StepReport, lr: float, done: float) -> None:
        super().step(progress, report, lr, done)
        if progress.step == 3:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_saves_after_the_step_and_leaves(archive: Path, recipe: Recipe, tmp_path: Path) -> None:
    run = open_run(recipe, archive, tmp_path, "cpu", False)
    before = signal.getsignal(signal.SIGINT)
    with Interrupting(tmp_path, 1) as reporter, pytest.raises(KeyboardInterrupt):
        pretrain.train(run, reporter)
    assert signal.getsignal(signal.SIGINT) is before
    assert open_run(recipe, archive, tmp_path, "cpu", True).progress == run.progress
    assert run.progress.step == 3


def test_by_the_clock_a_run_ends_on_time(
    archive: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(pretrain, "time", SimpleNamespace(monotonic=lambda: 0.1 * next(ticks)))
    timed = replace(recipe, train=replace(recipe.train, steps=0, minutes=2 / 60))
    run = open_run(timed, archive, tmp_path, "cpu", False)
    with Reporter(tmp_path, 0.5) as reporter:
        pretrain.train(run, reporter)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps[-2]["seconds"] < 2 <= run.progress.seconds < 2.2
    assert steps[-1]["lr"] < 0.5 * recipe.train.lr


def test_a_checkpoint_is_not_overwritten_and_must_fit(finished: TrainingRun, archive: Path, recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="holds a checkpoint; go on with --resume"):
        open_run(recipe, archive, finished.out, "cpu", False)
    other = replace(recipe, train=replace(recipe.train, optimizer="adamw"))
    with pytest.raises(ConfigError, match="another model or optimizer"):
        open_run(other, archive, finished.out, "cpu", True)
    with pytest.raises(ConfigError, match="no checkpoint"):
        open_run(recipe, archive, finished.out / "model", "cpu", True)
    with pytest.raises(ConfigError, match="unknown device 'tpu'"):
        open_run(recipe, archive, finished.out, "tpu", True)


def test_divergence_is_told(archive: Path, recipe: Recipe, tmp_path: Path) -> None:
    run = open_run(recipe, archive, tmp_path, "cpu", False)
    run.master["embedding.weight"].fill_(torch.nan)
    with pytest.raises(Diverged, match=r"lower train\.lr"):
        run.step()


def test_transformers_and_our_loader_give_the_trained_logits(finished: TrainingRun) -> None:
    transformers = pytest.importorskip("transformers")
    folder = finished.out / "model"
    ids = torch.arange(3, 60)
    batch = TrainBatch(ids, ids, torch.arange(len(ids)), (0, len(ids)))
    rounded = {n: w.bfloat16().float() for n, w in finished.master.items()}
    trained = Decoder(model_spec(finished.recipe))
    trained.prepare(160)
    trained.load_state_dict(rounded)
    loaded = load_model(open_checkpoint(folder), "float32", 160)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = theirs(ids[None]).logits[0]
        for model in (trained, loaded):
            torch.testing.assert_close(model.logits(model(model.embed(ids), batch, None)), want, rtol=1e-4, atol=1e-4)
    assert theirs.generation_config.eos_token_id == [2, 0]
    assert theirs.dtype == torch.float32
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


def test_the_card_says_what_the_results_say(finished: TrainingRun) -> None:
    results = json.loads((finished.out / "model" / "results.json").read_text())
    written = (finished.out / "model" / "MODEL_CARD.md").read_text()
    for number in (
        f"{results['loss_per_token']:.4f}",
        f"{results['bits_per_byte']:.4f}",
        f"{results['raw']['bits_per_byte']:.4f}",
        f"{results['tokens']:,}",
        f"{results['parameters']:,}",
    ):
        assert number in written
    assert "/" not in results["recipe"]["data"]["path"]


def test_the_dtype_is_the_machines_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for isa, want in (({"avx2"}, torch.float32), ({"avx512_bf16"}, torch.bfloat16)):
        here = Hardware("x", 1, frozenset(isa), 1, 1)
        monkeypatch.setattr("tuili.train.run.probe", lambda here=here: here)
        assert dtype_of("auto", cpu) == want
        assert dtype_of("auto", torch.device("cuda")) == dtype_of("bfloat16", cpu) == torch.bfloat16
        assert dtype_of("float32", torch.device("cuda")) == torch.float32


def test_the_draft_takes_the_targets_tokenizer(
    finished: TrainingRun, archive: Path, recipe: Recipe, tmp_path: Path
) -> None:
    draft = replace(recipe, tokenizer=replace(recipe.tokenizer, path=str(finished.out / "model")))
    run = open_run(draft, archive, tmp_path, "cpu", False)
    assert run.tokenizer.to_str() == Tokenizer.from_file(str(finished.out / "tokenizer.json")).to_str()
    absent = replace(recipe, tokenizer=replace(recipe.tokenizer, path=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match="no tokenizer at"):
        open_run(absent, archive, tmp_path / "other", "cpu", False)


def test_checkpoints_record_the_recipe(finished: TrainingRun, recipe: Recipe) -> None:
    with safe_open(finished.out / CHECKPOINT, "pt") as opened:
        assert json.loads(opened.metadata()["recipe"]) == json.loads(json.dumps(asdict(recipe)))


class Killed(BaseException):
    """What a process that is killed does next: nothing."""


@pytest.mark.parametrize("point", ["save_file", "half", "fsync", "replace", "replaced"])
def test_a_kill_at_any_moment_leaves_a_checkpoint(
    archive: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    run = open_run(recipe, archive, tmp_path, "cpu", False)
    run.save()
    run.progress.step = 7
    before, whole, replace_file = checkpoint.save_file, b"", Path.replace

    def half(tensors: dict[str, torch.Tensor], file: Path, header: dict[str, str]) -> None:
        before(tensors, file, header)
        nonlocal whole
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        raise Killed

    def replaced(file: Path, to: Path) -> None:
        replace_file(file, to)
        raise Killed

    def killed(*args: object) -> None:
        raise Killed

    target, name = {
        "fsync": ("os", "fsync"),
        "replace": ("pathlib.Path", "replace"),
        "replaced": ("pathlib.Path", "replace"),
    }.get(point, ("tuili.train.checkpoint", "save_file"))
    with monkeypatch.context() as patch:
        patch.setattr(f"{target}.{name}", {"half": half, "replaced": replaced}.get(point, killed))
        with pytest.raises(Killed):
            run.save()
    assert open_run(recipe, archive, tmp_path, "cpu", True).progress.step == (7 if point == "replaced" else 0)
    run.save()
    assert open_run(recipe, archive, tmp_path, "cpu", True).progress.step == 7


def test_a_file_that_is_no_checkpoint_is_named(archive: Path, recipe: Recipe, tmp_path: Path) -> None:
    run = open_run(recipe, archive, tmp_path, "cpu", False)
    run.save()
    file = tmp_path / CHECKPOINT
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[:-8], b"x" * 4096):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="is no checkpoint of a run"):
            run.resume()
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match="is no checkpoint of a run"):
        run.resume()


def test_a_second_stage_begins_with_the_weights_and_names_the_first(
    finished: TrainingRun, archive: Path, recipe: Recipe, tmp_path: Path
) -> None:
    model = finished.out / "model"
    second = replace(
        recipe,
        train=replace(recipe.train, start=str(model), steps=1),
        tokenizer=replace(recipe.tokenizer, path=str(model)),
    )
    run = open_run(second, archive, tmp_path / "run", "cpu", False)
    for name, weight in finished.master.items():
        assert torch.equal(run.master[name], weight.bfloat16().float()), name
    pretrain.complete(run)
    results = json.loads((run.out / "model" / "results.json").read_text())
    first = json.loads((model / "results.json").read_text())
    assert [stage["tokens"] for stage in results["earlier"]] == [first["tokens"]]
    assert results["recipe"]["train"]["start"] == "model"
    assert f"{first['tokens']:,} tokens" in (run.out / "model" / "MODEL_CARD.md").read_text()
    narrow = replace(second, model=replace(second.model, intermediate_size=recipe.model.intermediate_size + 16))
    with pytest.raises(ConfigError, match="another model than the recipe's"):
        open_run(narrow, archive, tmp_path / "narrow", "cpu", False)


def test_topics_are_counted_by_the_word_between_stars(finished: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(("The Fox ran.", "An owl sat.", "A fox! A fox!", "Two owls sat.", "It rained.", "A mouse."))
    asked: list[str] = []

    def scripted(model: Decoder, tokenizer: Tokenizer, prompt: str, *rest: object) -> str:
        asked.append(prompt)
        return next(answers)

    report = ReportRecipe(sample_prompts=(), openings=(), topics=("a *fox* at sea", "an *owl*"), topic_draws=3)
    monkeypatch.setattr(finished, "recipe", replace(finished.recipe, report=report))
    monkeypatch.setattr("tuili.train.results.answer", scripted)
    results = measure(finished)
    assert results["topics"] == {"a *fox* at sea": 2, "an *owl*": 1}
    assert asked[0] == "Tell a bedtime story about a fox at sea."
    assert "3 name" in card.write(results)


def test_a_recast_share_of_one_recasts_training_but_not_held_out_stories(finished: TrainingRun, recipe: Recipe) -> None:
    made = (finished.stories.prompter, finished.tokenizer, replace(recipe.data, recast=1.0), 0)
    stories = Stories(finished.stories.documents, *made)
    for index in range(20):
        own = stories.tokenizer.decode(stories.answers[index].tolist())
        held_out, trained = (stories.tokenizer.decode(stories.chat(index, epoch)[0]) for epoch in (-1, 0))
        assert own[:60] in held_out
        assert own[:120] not in trained


def test_passages_cut_recast_answers_only(finished: Run, recipe: Recipe) -> None:
    made = (finished.stories.prompter, finished.tokenizer)
    for recast in (0.0, 1.0):
        data = replace(recipe.data, recast=recast, passage=50, max_len=400)
        stories = Stories(finished.stories.documents, *made, data, 0)
        learned = {len(ids) - prompt for ids, prompt in (stories.chat(index, 0) for index in range(20))}
        assert (learned == {50}) == bool(recast)
        assert all(len(ids) - prompt > 50 for ids, prompt in (stories.chat(index, -1) for index in range(20)))
