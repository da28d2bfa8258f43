"""`portax validate`, up to where an engine is loaded; `tests/logits/check_tokens.py` goes on with real ones."""

import json
import sys

import pytest
from conftest import CHECKPOINTS, GOLDEN, command, tree

import portax
from portax.checkpoints import config_json
from portax.integrations.vllm import validation_engine as vllm
from portax.layouts import HuggingFace, TpuInference
from portax.validation import session
from portax.validation.coverage import coverage
from portax.validation.prompts import make_prompt
from portax.validation.session import Generated, Loaded

DENSE = CHECKPOINTS / "qwen3-0.6b.scan"
GEMMA = CHECKPOINTS / "gemma4-31b.scan"
CHECKPOINT, HUB = DENSE / "orbax", DENSE / "hf_config.json"


def main(*args):
    return command("validate", *args)


@pytest.fixture
def nothing_read(monkeypatch):
    """No weight is read, and no engine is made."""
    monkeypatch.setattr(portax.BaseConverter, "stream", lambda *_, **__: pytest.fail("weights were converted"))
    monkeypatch.setattr(portax.WeightSync, "__call__", lambda *_: pytest.fail("weights were written"))


def test_a_dry_run_needs_no_engine(capsys, nothing_read):
    assert main(CHECKPOINT, "--hub-config", HUB, "--tokens", "2,255", "--dry-run") == 0
    out = capsys.readouterr().out
    for line in (
        "trainer leaves read        13   757 kB",
        "engine leaves written      46   757 kB",
        "{0...3}.mlp.up_proj",
    ):
        assert line in out
    assert out.endswith("prompt     2, 255\nwould generate up to 16 tokens with transformers\n")


def test_the_configuration_may_be_the_hubs_or_lie_beside_the_checkpoint(tmp_path, capsys, nothing_read):
    assert main(CHECKPOINT, "--config", HUB, "--dry-run", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert first["prompt"] == [*session.DEFAULT_TOKENS]
    beside = tmp_path / "checkpoint"
    beside.mkdir()
    for path in CHECKPOINT.iterdir():
        (beside / path.name).symlink_to(path)
    (beside / "config.json").symlink_to(HUB)
    assert main(beside, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out) == first


def test_gemma_is_given_its_bos(capsys, nothing_read):
    assert main(GEMMA / "orbax", "--config", GEMMA / "hf_config.json", "--tokens", "7,8", "--dry-run") == 0
    assert "prompt     2, 7, 8 (<bos>, 2, was put in front: this model's prompts begin" in capsys.readouterr().out


def converter(folder):
    config = json.loads((folder / "hf_config.json").read_text())
    return portax.converter_for(config, layout=HuggingFace()), config


def test_bos_goes_in_front_once_and_only_where_it_belongs():
    gemma = converter(GEMMA)
    assert make_prompt([7, 2], *gemma) == session.Prompt((2, 7, 2), 2)
    assert make_prompt([2, 7], *gemma) == session.Prompt((2, 7), None)
    assert make_prompt([7], *converter(CHECKPOINTS / "qwen3-30b-a3b.scan")) == session.Prompt((7,), None)
    far = gemma[1] | {"text_config": gemma[1]["text_config"] | {"bos_token_id": 300}}
    with pytest.raises(portax.errors.ValidationError, match="token 300 is outside"):
        make_prompt([7], gemma[0], far)
    nameless = gemma[1] | {"text_config": gemma[1]["text_config"] | {"bos_token_id": None}}
    with pytest.raises(portax.ConfigError, match="begin with <bos>, and the hub config has no bos_token_id"):
        make_prompt([7], gemma[0], nameless)


def test_which_families_begin_with_bos():
    families = portax.converters.families()
    assert {block for block, family in families.items() if family.starts_with_bos} == {
        "gemma2",
        "gemma3",
        "gemma4",
        "gemma4_small",
    }


@pytest.mark.parametrize("token", [-1, 256])
def test_a_token_outside_the_vocabulary(token):
    with pytest.raises(
        portax.errors.ValidationError, match=rf"token {token} is outside this model's vocabulary, 0 to 255"
    ):
        make_prompt([7, token], *converter(DENSE))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((CHECKPOINT, "--prompt", "Hi", "--tokens", "2"), "not allowed with argument --prompt"),
        ((CHECKPOINT, "--tokens", "2,x"), "'2,x' is no list of token ids, such as 2,50429,563"),
        (
            (CHECKPOINT, "--hub-config", HUB, "--tokens", "2,256"),
            "token 256 is outside this model's vocabulary, 0 to 255",
        ),
        ((CHECKPOINT, "--hub-config", HUB, "--prompt", "Hi"), "a prompt of text needs a tokenizer"),
        (
            (CHECKPOINT, "--hub-config", HUB, "--prompt", "Hi", "--tokenizer", "gone"),
            "gone: there is no such tokenizer",
        ),
        ((CHECKPOINT, "--hub-config", HUB, "--max-new-tokens", "0"), "max_new_tokens=0: nothing would be generated"),
        ((CHECKPOINT, "--config", DENSE / "maxtext_config.json"), "no hub config.json: an engine is made from it"),
        ((CHECKPOINT, "--hub-config", DENSE / "maxtext_config.json"), "has no model_type, so it is no hub config.json"),
        ((CHECKPOINT, "--hub-config", "gone.json"), "gone.json: cannot be read"),
        (("gone", "--hub-config", HUB), "gone: there is no such checkpoint"),
        (
            (CHECKPOINT, "--config", DENSE / "maxtext_config.json", "--hub-config", GEMMA / "hf_config.json"),
            "the hub config is of another model",
        ),
        ((CHECKPOINT, "--hub-config", HUB, "--engine", "vllm"), "no module named 'vllm'. It needs vllm-tpu"),
        ((CHECKPOINT, "--hub-config", HUB), r"pip install 'portax[transformers]'"),
        ((CHECKPOINT, "--engine", "sglang"), "invalid choice: 'sglang'"),
    ],
)
def test_bad_input(args, message, capsys, monkeypatch, nothing_read):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    sys.modules.pop("portax.integrations.transformers", None)
    assert main(*args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("model", ["llama3.1-8b.scan", "qwen2.5-7b.scan"])
def test_the_hubs_config_of_a_family_goes_with_the_trainers(model):
    hub = json.loads((GOLDEN / model / "config.json").read_text())
    made = portax.converter_for(tree(model).config, layout=HuggingFace())
    config_json.check(hub, made, made.plan(tree(model).fill()))


def test_a_checkpoint_of_another_model(capsys, nothing_read):
    assert main(CHECKPOINT, "--hub-config", GEMMA / "hf_config.json") == 1
    assert "problems, nothing was changed" in capsys.readouterr().err


def test_vllm_wants_a_tpu(monkeypatch):
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(
        portax.errors.ValidationError,
        match=r"needs 4 TPU devices, and JAX finds 8 of platform 'cpu' here; --engine transformers",
    ):
        vllm.Vllm(tp=4)


def test_a_folder_without_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(portax.MissingPackageError, match=r"'transformers': pip install 'portax\[transformers\]'"):
        session.prepare(CHECKPOINT, json.loads(HUB.read_text()), "Hi", tokenizer=tmp_path)


class Parrot(session.Engine):
    """Says what it was told."""

    name = "parrot 1.0"

    def load(self, job):
        job.seconds["load"] = 0.5
        return Loaded(job.plan, {"lm_head.weight": "model.embed_tokens.weight"})

    def generate(self, tokens, count):
        return Generated(tuple(tokens)[:count], (0.25,) * count)


def test_what_there_is_to_say_of_a_validation(capsys):
    done = session.validate(CHECKPOINT, json.loads(HUB.read_text()), [9, 8, 7], engine=Parrot(), max_new_tokens=2)
    assert (done.prompt, done.bos, done.tokens, done.margins, done.text) == (
        (9, 8, 7),
        None,
        (9, 8),
        (0.25, 0.25),
        None,
    )
    read = json.loads(done.to_json())
    assert [*read["seconds"]] == ["plan", "load", "generate"]
    assert [(row["what"], len(row["names"]), row["nbytes"]) for row in read["coverage"]] == [
        ("trainer leaves read", 13, 756992),
        ("engine leaves written", 46, 756992),
        ("tied", 1, None),
    ]
    text = str(done)
    for line in ("lm_head.weight = model.embed_tokens.weight", "load         0.500", "engine     parrot 1.0"):
        assert line in text
    assert text.endswith("prompt     9, 8, 7\ngenerated  9, 8\nmargins    0.25, 0.25")


def test_coverage_of_an_engine():
    made = portax.converter_for(tree("qwen3-0.6b.scan").config, layout=TpuInference(version="0.32", tp=2))
    plan = made.plan(made.expected_tree())
    rows = {row.what: row for row in coverage(plan, ties=plan.ties, others=["opt_state/mu"])}
    assert rows["no parameters, not read"].names == ("opt_state/mu",)
    assert rows["cast float32 -> bfloat16"].names == tuple(entry.name for entry in plan.entries)
    assert rows["cast float32 -> bfloat16"].nbytes == rows["engine leaves written"].nbytes == plan.bytes_out
    assert rows["tied"].names == ("vllm_model.lm_head.weight = vllm_model.model.embed_tokens.weight",)
    assert "the engine's own, not written" not in rows


@pytest.mark.parametrize("folder", sorted(CHECKPOINTS.glob("*.scan")), ids=lambda folder: folder.name)
def test_recorded_continuations_are_clear(folder):
    vocabulary = json.loads((folder / "maxtext_config.json").read_text())["vocab_size"]
    for each in json.loads((folder / "greedy.json").read_text()):
        assert len(each["tokens"]) == len(each["margins"]) == 8
        assert min(each["margins"]) > 0.1
        assert len({*each["tokens"]}) > 1
        assert all(0 <= token < vocabulary for token in each["prompt"] + each["tokens"])
