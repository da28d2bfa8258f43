"""`portax validate` on real MaxText checkpoints must generate MaxText's own greedy tokens, by margins like MaxText's.

    python tests/logits/check_tokens.py [CHECKPOINT ...]      (needs requirements.txt beside this; exit code 1 if they differ)

Every checkpoint under tests/checkpoints comes with prompts, MaxText's continuations, and by how much each token was the best
(`oracle/greedy_maxtext.py`). Then a prompt of words goes in, by a tokenizer that spells token ids; and with the heads of the
queries in another order no continuation may pass as MaxText's.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import sys
import tempfile

CHECKPOINTS = pathlib.Path(__file__).parents[1] / "checkpoints"
DENSE, MOE = "qwen3-0.6b.scan", "qwen3-30b-a3b.scan"
UNTIED = 4e-4  # two frameworks sum float32 products in different orders; see check_logits.py
TIED = 0.125  # MaxText rounds the table to bfloat16 where it serves as the head; transformers does not


def recorded(name):
    """The hub's config of a checkpoint, and what MaxText generated."""
    files = ("hf_config.json", "greedy.json")
    return [json.loads((CHECKPOINTS / name / file).read_text()) for file in files]


def report(name, done, expected, tolerance):
    """Prints one line; whether tokens and margins are MaxText's."""
    farthest = max(abs(a - b) for a, b in zip(done["margins"], expected["margins"], strict=True))
    good = list(done["tokens"]) == expected["tokens"] and farthest <= tolerance
    sys.stdout.write(
        f"{name:22} {len(done['prompt']):2} tokens, then {list(done['tokens'])}; margins within {farthest:.1e}  "
        f"{'as MaxText' if good else 'NOT AS MAXTEXT: ' + str(expected['tokens'])}\n"
    )
    return good


def command(name, length, *prompt):
    """What `portax validate --json` prints."""
    from portax.cli.main import main as portax_command

    folder = CHECKPOINTS / name
    arguments = ["--config", folder / "maxtext_config.json", "--hub-config", folder / "hf_config.json"]
    arguments += [*prompt, "--max-new-tokens", length, "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = portax_command(["validate", *map(str, [folder / "orbax", *arguments])])
    if code:
        raise SystemExit(f"{name}: portax validate ends with exit code {code}")
    return json.loads(out.getvalue())


def check_checkpoint(name):
    """Whether the command generates what MaxText does; a `<bos>` is left for it to put in front."""
    hub, greedy = recorded(name)
    text = hub.get("text_config", hub)
    good = []
    for expected in greedy:
        bare = [token for token in expected["prompt"] if token != text["bos_token_id"]]
        done = command(name, len(expected["tokens"]), "--tokens", ",".join(map(str, bare)))
        if done["prompt"] != expected["prompt"]:
            raise SystemExit(f"{name}: the prompt is {done['prompt']}, not {expected['prompt']}")
        good.append(report(name, done, expected, TIED if hub["tie_word_embeddings"] else UNTIED))
    return all(good)


def check_text():
    """Whether text goes in and comes out by the tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    hub, (expected, *_) = recorded(DENSE)
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(hub["vocab_size"])}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()

    def text(tokens):
        return " ".join(f"w{token}" for token in tokens)

    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        done = command(DENSE, len(expected["tokens"]), "--prompt", text(expected["prompt"]), "--tokenizer", folder)
    sys.stdout.write(f"text: {text(expected['prompt'])} -> {done['text']}\n")
    return done["text"] == text(expected["tokens"])


def check_control():
    """Whether wrong weights tell in tokens and margins."""
    import numpy as np

    import portax
    from portax.integrations.transformers import Transformers
    from portax.validation.session import validate

    hub, greedy = recorded(MOE)  # untied, so held to the narrow tolerance
    params = {path: leaf[...] for path, leaf in portax.open_checkpoint(CHECKPOINTS / MOE / "orbax").items()}
    queries = "base/decoder/layers/self_attention/query/kernel"
    params[queries] = np.flip(params[queries], 2).copy()
    passed = []
    for expected in greedy:
        done = validate(params, hub, expected["prompt"], engine=Transformers(), max_new_tokens=len(expected["tokens"]))
        passed.append(report("heads in another order", dataclasses.asdict(done), expected, UNTIED))
    return not any(passed)


def main():
    """The exit code."""
    import jax
    from transformers.utils import logging

    logging.disable_progress_bar()
    names = sys.argv[1:] or sorted(path.name for path in CHECKPOINTS.glob("*.scan"))
    with tempfile.TemporaryDirectory() as programs:  # so that the second and third run of a checkpoint compile nothing
        jax.config.update("jax_compilation_cache_dir", programs)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        results = [*map(check_checkpoint, names), check_text(), check_control()]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
