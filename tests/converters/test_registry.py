"""Converters of other packages: found by entry point, and what is said of those that cannot be used."""

import sys

import pytest

import portax
from portax.converters import families

LAYOUT = portax.layouts.HuggingFace()
CONFIG = {
    "num_decoder_layers": 2,
    "emb_dim": 8,
    "num_query_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
    "mlp_dim": 16,
    "vocab_size": 32,
}
PLAIN = """
from portax.extend import PlainDecoder

class TheirConverter(PlainDecoder):
    decoder_blocks = ("their_block",)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution on the path: its module, and one entry point."""

    def put(name, source, value):
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[portax.converters]\n{name} = {value}\n")

    monkeypatch.syspath_prepend(tmp_path)
    yield put
    for module in ("theirs", "others"):
        sys.modules.pop(module, None)


def test_a_converter_of_another_package(install):
    install("theirs", PLAIN, "theirs:TheirConverter")
    converter = portax.converter_for(dict(CONFIG, decoder_block="their_block"), layout=LAYOUT)
    assert type(converter).__module__ == "theirs"
    assert len(converter.plan(converter.expected_tree()).entries) == 2 * 9 + 3


def test_two_for_one_decoder_block(install):
    install("theirs", PLAIN.replace("their_block", "qwen3"), "theirs:TheirConverter")
    with pytest.raises(
        portax.ConfigError,
        match=r"decoder_block='qwen3' has two converters, portax.converters.qwen3.Qwen3Converter and theirs.TheirConverter",
    ):
        families()


@pytest.mark.parametrize(
    ("source", "value", "match"),
    [
        (
            "import nowhere",
            "theirs:TheirConverter",
            r"theirs = theirs:TheirConverter of theirs: cannot be loaded \(Mod",
        ),
        (PLAIN, "theirs:Missing", r"cannot be loaded \(AttributeError"),
        ("TheirConverter = 3", "theirs:TheirConverter", "is no subclass of portax.BaseConverter"),
        (PLAIN.replace('("their_block",)', "()"), "theirs:TheirConverter", "that names its decoder_blocks"),
    ],
)
def test_converters_that_cannot_be_used(install, source, value, match):
    install("theirs", source, value)
    with pytest.raises(portax.ConfigError, match=match):
        portax.converter_for(dict(CONFIG, decoder_block="qwen3"), layout=LAYOUT)


def test_unknown_models_are_told_what_there_is():
    with pytest.raises(portax.ConfigError, match=r"'mamba' has no converter; known: .*entry point group 'portax.conv"):
        portax.converter_for(dict(CONFIG, decoder_block="mamba"), layout=LAYOUT)
