"""Pages of plans and diffs: all leaves, what feeds what, problems; small, safe, and written over nothing else."""

import base64
import dataclasses
import errno
import hashlib
import html.parser
import itertools
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from conftest import CHECKPOINTS, GOLDEN, command, tree
from engines import engine_state

import portax
from portax._text.names import fold, folded_into
from portax.analysis import cards, html_page
from portax.analysis.compare import Found
from portax.analysis.diff_report import Diff, LeafDiff
from portax.layouts import HuggingFace, TpuInference

TEMPLATE = (pathlib.Path(html_page.__file__).parent / "page.html").read_text()
MOE, TIED = "qwen3-30b-a3b.scan", "qwen3-0.6b.scan"
TP2 = TpuInference(version="0.32", tp=2)
NASTY = "base/decoder/</script><script>alert(1)</script><!--\u2028\ud800@picture@"


class Page(html.parser.HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.inside, self.scripts = [], [], None, []
        self.feed(text)
        self.picture = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")
            self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None if tag == self.inside else self.inside

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def names(card):
    """The leaves of a card, as the page's script lists them."""
    columns = [[n for a, b in ranges for n in range(a, b + 1)] for ranges in card["columns"]]
    rows = card.get("rows") or itertools.product(*columns)
    found = [
        "".join(map(str, itertools.chain(*itertools.zip_longest(card["name"], row, fillvalue="")))) for row in rows
    ]
    assert len(found) == card["count"]
    return found


def drawn(found, side):
    return {name: card for section in found["sections"] for card in section[side] for name in names(card)}


def planned(name, layout=TP2, params=None, target=None):
    params = tree(name).shapes if params is None else params
    plan = portax.converter_for(tree(name).config, layout=layout).plan(params, target)
    return plan, Page(html_page.render(cards.of_plan(plan, params, what=name))).picture


def refused(params):
    with pytest.raises(portax.PlanError) as caught:
        portax.converter_for(tree(MOE).config, layout=TP2).plan(params)
    found = cards.of_plan(caught.value.plan, params, what="", problems=caught.value.problems)
    return caught.value, Page(html_page.render(found)).picture


@pytest.mark.parametrize("name", [MOE, "qwen3-30b-a3b.unscan", "gemma4-26b.scan", "qwen3-next-80b-a3b.unscan"])
def test_every_leaf_and_what_it_is_made_of(name):
    plan, found = planned(name)
    made = {}
    for section in found["sections"]:
        for j, card in enumerate(section["right"]):
            sources = [pairs for pairs, count in card["from"] for _ in range(count)]
            assert {i for pairs in sources for i, _ in pairs} == {a for a, b in section["links"] if b == j}
            for leaf, pairs in zip(names(card), sources, strict=True):
                assert leaf not in made
                made[leaf] = tuple(names(section["left"][i])[k] for i, k in pairs)
    assert made == {entry.name: entry.sources for entry in plan.entries}
    cards = drawn(found, "right")
    for entry in plan.entries:
        card = cards[entry.name]
        assert (tuple(card["shape"]), card["dtype"]) == (entry.shape, entry.dtype.name)
        assert [tuple(axes) for axes in card["cuts"]] == [
            () if cut is None else (cut,) if isinstance(cut, str) else cut for cut in entry.spec
        ]
        assert card.get("casts", []) == [*entry.casts]
    assert sum(c["bytes"] for section in found["sections"] for c in section["right"]) == plan.bytes_out
    assert {*drawn(found, "left")} == {*tree(name).shapes}


def test_ties_and_the_engines_own_leaves():
    plan, found = planned(TIED, target=engine_state(TIED))
    cards = drawn(found, "right")
    assert cards["vllm_model.lm_head.weight"]["tied"] == "vllm_model.model.embed_tokens.weight"
    assert {name for name, card in cards.items() if card.get("state") == "own"} == {*plan.engine_owned} != set()
    assert ["tied", "vllm_model.lm_head.weight repeats vllm_model.model.embed_tokens.weight"] in found["facts"]


def test_a_plan_that_fails_is_drawn_with_its_problems():
    params = dict(tree(MOE).shapes)
    wrong, gone = "base/decoder/layers/moe_block/wi_0", "base/decoder/decoder_norm/scale"
    params[wrong] = jax.ShapeDtypeStruct((*params[wrong].shape[:-1], 7), np.float32)
    params[NASTY] = params.pop(gone)
    error, found = refused(params)
    assert [problem["leaf"] for problem in found["problems"]] == [problem.leaf for problem in error.problems]
    left, right = drawn(found, "left"), drawn(found, "right")
    assert {name: card["state"] for name, card in left.items() if "state" in card} == {
        wrong: "bad",
        NASTY: "bad",
        gone: "ghost",
    }
    assert {found["problems"][i]["leaf"] for i in left[wrong]["problems"]} == {wrong}
    assert [name for name, card in right.items() if card.get("state") == "bad"] == ["vllm_model.model.norm.weight"]
    section = next(s for s in found["sections"] if left[wrong] in s["left"])
    fed = [section["right"][b] for a, b in section["links"] if section["left"][a] == left[wrong]]
    assert [names(card)[1] for card in fed] == ["vllm_model.model.layers.1.mlp.experts.routed_experts.w13_weight"]


def test_problems_of_layers_mark_every_one_of_them():
    unscanned = dict(tree("qwen3-30b-a3b.unscan").shapes)
    for layer in (1, 3):
        unscanned[f"base/decoder/layers_{layer}/moe_block/wo"] = jax.ShapeDtypeStruct((2,), np.float32)
    error, found = refused(unscanned)
    assert any("{1,3}" in problem.leaf for problem in error.problems)
    bad = {name for name, card in drawn(found, "left").items() if card.get("state") == "bad"}
    assert bad == {f"base/decoder/layers_{layer}/moe_block/wo" for layer in (1, 3)}


def test_what_could_not_be_planned_at_all_is_drawn_too():
    for params in ({}, {"x": "no array"}):
        error, found = refused(params)
        assert error.plan is None
        assert len(found["problems"]) == 1
        assert found["facts"] == [["plan", "none: it did not come so far"]]


def test_names_cannot_leave_the_data():
    text = html_page.render(cards.of_diff(portax.diff({NASTY: np.ones(1)}, {NASTY: np.ones(1)})))
    found = Page(text)
    assert found.tags.count("script") == 2
    assert [*drawn(found.picture, "left")] == [NASTY.removeprefix("base/")] or [*drawn(found.picture, "left")] == [
        NASTY
    ]
    data = text.partition('id="picture">')[2].partition("</script>")[0]
    assert not {*"<>&"} & {*data}
    assert data.isascii()


def test_the_page_needs_nothing_else_and_allows_nothing_else():
    text = html_page.render(cards.of_diff(portax.diff({"a": np.ones(1)}, {"a": np.ones(1)})))
    found = Page(text)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {*found.tags}
    assert not [name for name, _ in found.attributes if name in ("src", "href", "srcset", "style") or name[:2] == "on"]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|innerHTML|insertAdjacent|document\.write|eval\(", text)
    assert re.findall(r"https?://\S+", text) == ['http://www.w3.org/2000/svg",']
    policy = next(value for name, value in found.attributes if value and value.startswith("default-src 'none'"))
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy


def grown(small, layers=94, experts=16):
    """A plan's second layer and its second expert, many times over."""

    def named(name, layer, expert):
        return re.sub(r"(layers[._])1\b", rf"\g<1>{layer}", name).replace("experts.1.", f"experts.{expert}.")

    for layer, expert in itertools.product(range(layers), range(experts)):
        for entry in small:
            sources = tuple(named(source, layer, expert) for source in entry.sources)
            yield dataclasses.replace(entry, name=named(entry.name, layer, expert), sources=sources)


def test_a_large_model_stays_small():
    name = "qwen3-30b-a3b.unscan"
    plan, _ = planned(name, HuggingFace())
    entries = tuple(grown([entry for entry in plan.entries if ".layers.1.mlp.experts.1." in entry.name]))
    [shape] = {tree(name).shapes[f"base/decoder/layers_1/moe_block/{what}"] for what in ("wi_0", "wi_1")}
    params = {source: shape for entry in entries for source in entry.sources}
    plan = dataclasses.replace(plan, entries=entries)
    text = html_page.render(cards.of_plan(plan, params, what=""))
    assert {*drawn(Page(text).picture, "right")} == {entry.name for entry in entries}
    assert len(entries) == 94 * 16 * 3
    assert len(text) < 100_000
    leaves = (
        LeafDiff(entry.name, shape, shape, Found(math.prod(entry.shape) - i, 1 / (i + 3)))
        for i, entry in enumerate(entries[::3])
    )
    text = html_page.render(cards.of_diff(Diff("a", "b", tuple(leaves), values=True, beside={})))
    assert len(Page(text).picture["sections"][0]["right"][0]["each"][0]) == 94 * 16
    eightfold = 3 * 8 * (len(text) - len(TEMPLATE))  # three projections of 128 experts
    assert len(TEMPLATE) + eightfold < 1_000_000


def test_a_diff_shows_both_sides_and_every_verdict():
    a = {f"layers.{i}.w": np.ones((2, 3), np.float32) for i in range(4)} | {"gone": np.ones(2), "kind": np.ones(2)}
    b = {name: leaf.copy() for name, leaf in a.items() if name != "gone"} | {"new": np.ones(1)}
    b["kind"] = b["kind"].astype(np.int32)
    b["layers.1.w"][0] = np.inf, np.nan, 2
    b["layers.3.w"] += 1
    found = Page(html_page.render(cards.of_diff(portax.diff(a, b)))).picture
    sections = {section["title"]: section for section in found["sections"]}
    assert [*sections] == ["differ", "only in A", "only in B", "equal"]
    assert {*drawn(found, "left")} == {*a}
    assert {*drawn(found, "right")} == {*b}
    card = drawn(found, "right")["layers.3.w"]
    assert names(card) == ["layers.1.w", "layers.3.w"]
    assert card["found"] == {"different": 9, "largest": "inf", "nans": [0, 1], "elements": 12}
    assert card["each"] == [[3, 6], ["inf", 1.0]]
    assert drawn(found, "right")["kind"]["verdict"] == "dtype"
    assert drawn(found, "left")["gone"]["verdict"] == "only in A"
    assert [card["state"] for card in sections["equal"]["right"]] == ["good"]
    unread = cards.of_diff(portax.diff(a, a, values=False))["sections"]
    assert [section["title"] for section in unread] == ["equal in shape and dtype"]
    assert {card["state"] for card in unread[0]["right"]} == {""}


def test_a_page_replaces_a_page_and_nothing_else(tmp_path, monkeypatch):
    shown = cards.of_diff(portax.diff({"a": np.ones(1)}, {"a": np.ones(1)}))
    mine = tmp_path / "page.html"
    html_page.write(mine, shown)
    first = mine.read_text()
    html_page.write(mine, shown | {"what": "again"})
    assert Page(mine.read_text()).picture["what"] == "again" != Page(first).picture["what"]
    other, link = tmp_path / "notes.html", tmp_path / "link.html"
    other.write_text("<html>mine</html>")
    link.symlink_to(mine)
    for path in (other, link, tmp_path):
        with pytest.raises(portax.errors.ReportError, match="exists, and is no page of portax; nothing was written"):
            html_page.write(path, shown)
    with pytest.raises(portax.errors.ReportError, match="there is no folder"):
        html_page.write(tmp_path / "none" / "page.html", shown)
    before = mine.read_text()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(portax.errors.ReportError, match=r"page\.html: the disk is full"):
        html_page.write(mine, shown)
    assert mine.read_text() == before
    assert other.read_text() == "<html>mine</html>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "notes.html", "page.html"]


def test_what_was_folded_is_known_again():
    layers = [f"base/decoder/layers_{i}/mlp/wo" for i in range(9)]
    experts = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(6) for j in range(3)]
    odd = ["lm_head.weight", "a{,}b", "a{0...99999999999}b", "a{1}{b", "(a+)+$"]
    for group in (layers[:3], layers[1:6:2], layers[7:8], experts[:3] + experts[15:], [odd[0]], *([x] for x in odd)):
        [folded] = fold(group)
        assert [*filter(folded_into(folded), [*layers, *experts, *odd])] == group


def test_the_command_writes_the_page_of_a_plan(tmp_path, capsys):
    out = tmp_path / "plan.html"
    args = ("plan", GOLDEN / TIED / "source.json", "--engine-version", "0.32", "--html", out)
    assert command(*args, "--tp", "2", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert {*drawn(Page(out.read_text()).picture, "right")} == {*plan["entries"]}
    assert command(*args, "--tp", "2", "--strict-dtype") == 1
    found = Page(out.read_text()).picture
    assert all(card["state"] == "bad" for card in drawn(found, "right").values())
    out.write_text("mine")
    assert command(*args, "--tp", "2") == 2
    assert "is no page of portax" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_the_command_writes_the_page_of_a_diff(tmp_path, capsys):
    source, out = CHECKPOINTS / TIED / "orbax", tmp_path / "diff.html"
    assert command("diff", source, source, "--html", out) == 0
    assert "13 leaves: 13 equal" in capsys.readouterr().out
    assert {card["state"] for card in drawn(Page(out.read_text()).picture, "right").values()} == {"good"}
