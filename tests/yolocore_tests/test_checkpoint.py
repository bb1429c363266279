"""Checkpoints that a crash cannot tear, and weights files that cannot run anything."""

import json
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from fill_rule import nano_state
from torch import Tensor

from yolocore import unpickle
from yolocore.checkpoint import load, load_weights, save_atomic, save_weights, transfer
from yolocore.errors import CheckpointError, WeightsError
from yolocore.model import ANCHORS_KEY, YOLOv5, initial_state

# Checkpoints of our own


def test_save_atomic_then_load_gives_the_tree_back(tmp_path: Path) -> None:
    tree = {
        "epoch": 3,
        "rng": 2**127 + 1,
        "ratio": 0.1,
        "name": "slot",
        "flags": [True, None, (1, -2.5)],
        "by_slot": {0: "a", 1: {"x": []}},
        "half": torch.tensor([1.5, -2], dtype=torch.float16),
        "count": torch.tensor(7),
        "last": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }
    path = tmp_path / "new" / "slot.ckpt"
    save_atomic(path, tree)
    back = load(path)
    tensors = {name: back.pop(name) for name in ("half", "count", "last")}
    assert back == {name: value for name, value in tree.items() if name not in tensors}
    assert type(back["flags"][2]) is tuple
    for name, tensor in tensors.items():
        assert tensor.dtype == tree[name].dtype
        assert torch.equal(tensor, tree[name])
    assert [p.name for p in path.parent.iterdir()] == ["slot.ckpt"]


def test_save_atomic_view_is_stored_without_the_rest_of_its_tensor(tmp_path: Path) -> None:
    stacked = torch.arange(1_000_000.0).view(100, 10_000)
    parameter = torch.nn.Parameter(stacked)
    save_atomic(tmp_path / "one", {"slot": parameter[42]})
    assert (tmp_path / "one").stat().st_size < 60_000
    assert torch.equal(load(tmp_path / "one")["slot"], stacked[42])


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ({"a": {"b": [1, np.float64(2.0)]}}, r"tree\['a'\]\['b'\]\[1\]: float64; allowed"),
        ({"a": Path("x")}, r"tree\['a'\]: \w*Path"),
        ({1.5: 1}, "tree: key 1.5 of type float"),
        ([{1, 2}], r"tree\[0\]: set"),
    ],
)
def test_save_atomic_of_what_load_would_refuse_names_the_place(tmp_path: Path, tree: object, where: str) -> None:
    save_atomic(tmp_path / "c", {"old": 1})
    with pytest.raises(TypeError, match=where):
        save_atomic(tmp_path / "c", tree)
    assert load(tmp_path / "c") == {"old": 1}


def test_save_atomic_where_nothing_can_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        save_atomic(tmp_path / "file" / "c", {})
    assert len(str(caught.value).splitlines()) == 1


WRITER = """
import sys, torch
from pathlib import Path
from yolocore.checkpoint import save_atomic
for n in range(10**6):
    save_atomic(Path(sys.argv[1]), {"n": n, "x": torch.full((500_000,), float(n))})
    print(n, flush=True)
"""


def test_save_atomic_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "slot.ckpt"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        line = process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    back = load(path)
    assert back["n"] >= int(line)
    assert bool((back["x"] == back["n"]).all())


def damaged(good: bytes, how: str) -> bytes:
    if how == "flipped":  # inside the tensor's numbers
        place = good.index(torch.full((8,), 1.25).numpy().tobytes())
        return good[:place] + b"\x01" + good[place + 1 :]
    return {"empty": b"", "cut": good[: len(good) // 2], "text": b"hello", "tail cut": good[:-10]}[how]


@pytest.mark.parametrize("how", ["empty", "cut", "text", "tail cut", "flipped"])
def test_load_damaged_checkpoint_is_a_checkpoint_error(tmp_path: Path, how: str) -> None:
    save_atomic(tmp_path / "good", {"x": torch.full((64,), 1.25)})
    path = tmp_path / "bad"
    path.write_bytes(damaged((tmp_path / "good").read_bytes(), how))
    with pytest.raises(CheckpointError, match="bad: damaged") as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_load_missing_or_foreign_checkpoint_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: no such checkpoint"):
        load(tmp_path / "nothing")
    torch.save({"x": Path("x")}, tmp_path / "objects")
    with pytest.raises(CheckpointError, match="objects: damaged or not a checkpoint"):
        load(tmp_path / "objects")


# Weights files


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_save_weights_then_load_weights_gives_the_state_back(tmp_path: Path, suffix: str) -> None:
    model = YOLOv5.stack("n", 3, [initial_state("n", 3, 1), nano_state()])
    path = tmp_path / f"weights{suffix}"
    save_weights(path, model.unstack(1))
    assert_same(load_weights(path), nano_state())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".pt":
        assert list(torch.load(path, weights_only=True)) == list(nano_state())


def test_save_weights_with_another_suffix_names_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"suffix '.onnx' of a weights file; allowed: .safetensors, .pt"):
        save_weights(tmp_path / "w.onnx", {})


def test_load_weights_reads_a_plain_state_dict_of_torch_as_float32(tmp_path: Path) -> None:
    whole = torch.arange(12, dtype=torch.float64).view(3, 4)
    state = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2)).half().state_dict()  # has _metadata
    state["view"] = whole.t()[1:3]
    state["empty"] = torch.empty(0, 3)
    state["brain"] = torch.tensor([1.5], dtype=torch.bfloat16)
    torch.save(state, tmp_path / "state.pt")
    back = load_weights(tmp_path / "state.pt")
    assert list(back) == list(state)
    assert back["view"].tolist() == [[1, 5, 9], [2, 6, 10]]
    assert_same(back, {name: t.float() if t.is_floating_point() else t for name, t in state.items()})


def test_load_weights_reads_ema_first_and_state_dicts_inside_checkpoints(tmp_path: Path) -> None:
    tree = {"epoch": 1, "model": {"w": torch.zeros(2)}, "ema": {"w": torch.ones(2)}}
    torch.save(tree, tmp_path / "both.pt")
    torch.save({**tree, "ema": None}, tmp_path / "model.pt")
    assert load_weights(tmp_path / "both.pt")["w"].tolist() == [1, 1]
    assert load_weights(tmp_path / "model.pt")["w"].tolist() == [0, 0]


def test_load_weights_of_the_golden_checkpoint_equals_its_record(golden_dir: Path) -> None:
    golden = json.loads((golden_dir / "ckpt_tiny_stripped.json").read_text())
    weights = load_weights(golden_dir / "ckpt_tiny_stripped.pt")
    shapes = [[name, list(tensor.shape)] for name, tensor in weights.items()]
    assert shapes == [[name, shape] for name, shape, _ in golden["keys"]]
    dtypes = {"float16": torch.float32, "int64": torch.int64}
    assert [t.dtype for t in weights.values()] == [dtypes[dtype] for *_, dtype in golden["keys"]]
    assert {name: float(tensor.double().sum()) for name, tensor in weights.items()} == golden["sums"]
    assert weights[ANCHORS_KEY].tolist() == golden["anchors_grid_units"]
    learned = [t for n, t in weights.items() if n.endswith(("weight", "bias"))]
    assert sum(t.numel() for t in learned) == golden["total_params"]


def test_load_weights_of_the_official_nano_fits_the_model_and_fine_tunes(fixtures_dir: Path) -> None:
    weights = load_weights(fixtures_dir / "weights" / "yolov5n.pt")
    model = YOLOv5.stack("n", 80, [weights])
    assert sum(p.numel() for p in model.parameters()) == 1_872_157
    assert list(weights) == list(model.unstack(0))
    fresh = initial_state("n", 3, 5)
    merged, transferred, total = transfer(weights, fresh)
    assert (transferred, total) == (343, 349)
    assert list(merged) == list(fresh)
    assert torch.equal(merged["model.23.cv3.conv.weight"], weights["model.23.cv3.conv.weight"])
    assert torch.equal(merged["model.24.m.0.weight"], fresh["model.24.m.0.weight"])


def test_load_weights_official_nano_sees_objects_only_where_there_are_any(fixtures_dir: Path) -> None:
    model = YOLOv5.stack("n", 80, [load_weights(fixtures_dir / "weights" / "yolov5n.pt")]).eval()
    with torch.no_grad():
        raw = model(torch.full((1, 3, 320, 320), 114 / 255))
    assert max(float(o[..., 4].sigmoid().max()) for o in raw) < 0.05


def test_transfer_takes_equal_names_and_shapes_and_may_keep_the_anchors() -> None:
    target = {
        "a": torch.zeros(2),
        "b": torch.zeros(3, dtype=torch.float64),
        "c": torch.zeros(1),
        "x.anchors": torch.zeros(1),
    }
    state = {"b": torch.ones(3), "a": torch.ones(1), "x.anchors": torch.ones(1), "z": torch.ones(1)}
    merged, transferred, total = transfer(state, target)
    assert (transferred, total) == (2, 4)
    assert {name: t.tolist() for name, t in merged.items()} == {
        "a": [0, 0], "b": [1, 1, 1], "c": [0], "x.anchors": [1],
    }  # fmt: skip
    assert merged["b"].dtype == torch.float64
    kept, transferred, _ = transfer(state, target, keep_anchors=True)
    assert (transferred, kept["x.anchors"].tolist()) == (1, [0])
    kept["a"].fill_(9)
    assert target["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"", "not a weights file"),
        ("a.pt", b"\x80\x04N.", "not a weights file"),
        ("a.safetensors", b"12345", "damaged or not a safetensors file"),
        ("missing.pt", None, "no such weights file; nothing is downloaded"),
    ],
)
def test_load_weights_of_no_weights_is_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


# Hostile files


def archive(path: Path, program: bytes, data: bytes = b"", compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip as torch writes it, with the given pickle and one storage."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", program)
        file.writestr("x/data/0", data)
    return path


class Calls:
    """Pickles as a call."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def named(module: str, name: str, args: bytes = b"(tR") -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + args + b"."


def stack_named(module: str, name: str) -> bytes:
    """STACK_GLOBAL, which may reach attributes of attributes."""
    parts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    return b"\x80\x04" + b"".join(parts) + b"\x93."


HOSTILE = {
    "os.system": named("os", "system", b"(Vtouch hacked\ntR"),
    "builtins.eval": pickle.dumps(Calls(eval, "open('hacked', 'w')")),
    "builtins.exec": named("builtins", "exec"),
    "subprocess.Popen": pickle.dumps(Calls(subprocess.Popen, ["touch", "hacked"])),
    "torch.serialization.os.system": stack_named("torch.serialization", "os.system"),
    "torch.load": named("torch", "load"),
    "torch.os.system": stack_named("torch", "os.system"),
    "torch._utils.__builtins__": named("torch._utils", "__builtins__"),
    "torch._utils._rebuild_tensor_v2.__globals__": stack_named("torch._utils", "_rebuild_tensor_v2.__globals__"),
    "collections.OrderedDict.fromkeys": stack_named("collections", "OrderedDict.fromkeys"),
    "models.common.os": named("models.common", "os"),
    "__builtin__.getattr": named("__builtin__", "getattr"),
    "copyreg._reconstructor": named("copyreg", "_reconstructor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_load_weights_that_names_code_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "evil.pt", HOSTILE[name])
    with pytest.raises(WeightsError) as caught:
        load_weights(path)
    assert str(caught.value) == f"{path}: refused: it names '{name}', which a YOLOv5 weights file does not need"
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pt"]


@pytest.mark.parametrize("args", [b"(I1\ntR", b"(I1\nt\x81"])  # REDUCE and NEWOBJ
def test_load_weights_that_calls_an_allowed_class_is_refused_by_name(tmp_path: Path, args: bytes) -> None:
    path = archive(tmp_path / "evil.pt", named("models.common", "Conv", args))
    with pytest.raises(WeightsError, match=r"refused: it calls 'models\.common\.Conv'"):
        load_weights(path)


@pytest.mark.parametrize(("module", "name"), sorted(unpickle._ALLOWED))
def test_load_weights_that_writes_to_an_allowed_name_cannot_change_it(tmp_path: Path, module: str, name: str) -> None:
    target = unpickle._ALLOWED[module, name]
    before = set(dir(target))
    state = b"}U\x05stateI1\ns"  # {"state": 1}
    for program in (named(module, name, state + b"b"), named(module, name, b"N" + state + b"\x86b")):
        with pytest.raises(WeightsError):
            load_weights(archive(tmp_path / "evil.pt", program))
    assert set(dir(target)) == before
    assert not hasattr(target, "state") or not isinstance(target.state, int)


class Persistent(pickle.Pickler):
    """Writes storages as torch does."""

    def persistent_id(self, obj: object) -> object:
        return obj.pid if isinstance(obj, Storage) else None


class Storage:
    def __init__(self, numel: object, kind: str = "storage") -> None:
        self.pid = (kind, torch.FloatStorage, "0", "cpu", numel)


def tensor_file(path: Path, storage: Storage, offset: object, size: object, stride: object) -> Path:
    call = Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
    with (path.parent / "program").open("wb") as file:
        Persistent(file, protocol=2).dump({"w": call})
    return archive(path, (path.parent / "program").read_bytes(), b"\x00" * 16)


def test_load_weights_tensor_inside_its_storage_is_read(tmp_path: Path) -> None:
    assert load_weights(tensor_file(tmp_path / "w.pt", Storage(4), 1, (3,), (1,)))["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("storage", "offset", "size", "stride"),
    [
        (Storage(4), 2, (3,), (1,)),
        (Storage(4), 0, (2, 2), (3, 1)),
        (Storage(4), 0, (10**12,), (0,)),
        (Storage(4), -1, (2,), (1,)),
        (Storage(4), 0, (2,), (-1,)),
        (Storage(4), 0, (2, 2), (1,)),
        (Storage(4), 0, "ab", (1, 1)),
        (Storage(8), 0, (8,), (1,)),
        (Storage("4"), 0, (4,), (1,)),
        (Storage(4, "file"), 0, (4,), (1,)),
    ],
)
def test_load_weights_tensor_outside_its_storage_is_refused(
    tmp_path: Path, storage: Storage, offset: object, size: object, stride: object
) -> None:
    path = tensor_file(tmp_path / "evil.pt", storage, offset, size, stride)
    with pytest.raises(WeightsError, match=r"evil\.pt: (damaged|refused)") as caught:
        load_weights(path)
    assert len(str(caught.value).splitlines()) == 1


def test_load_weights_from_a_compressed_entry_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.pt", pickle.dumps({}, 2) + b"\x00" * 10**6, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match=r"entry data\.pkl is compressed"):
        load_weights(path)


@pytest.mark.parametrize("opcode", [b"r\x00\x00\x00\x08", b"p134217728\n", b"r\x20\x00\x00\x00"])  # LONG_BINPUT, PUT
def test_load_weights_memo_number_beyond_the_pickle_is_refused_before_it_runs(tmp_path: Path, opcode: bytes) -> None:
    path = archive(tmp_path / "evil.pt", b"\x80\x02}" + opcode + b".")
    tracemalloc.start()
    with pytest.raises(WeightsError, match=r"damaged .*\(memo entry \d+ in a pickle of \d+ bytes\)"):
        load_weights(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def module_program(children: str, depth: int) -> bytes:
    """Pickled by hand: `depth` modules, each with the one before as its children named by the letters."""
    new = b"ctorch.nn.modules.container\nSequential\n)\x81"
    program = b"\x80\x02" + new + b"}b" + b"q\x00"
    for level in range(depth):
        get = b"h" + bytes([level])
        items = b"".join(b"U\x01" + letter.encode() + get for letter in children)
        program += new + b"}U\x08_modules}(" + items + b"usb" + b"q" + bytes([level + 1])
    return program + b"."


def test_load_weights_modules_that_share_children_without_end_are_refused_at_once(tmp_path: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(WeightsError, match="more than 200000 entries in its modules"):
        load_weights(archive(tmp_path / "evil.pt", module_program("ab", 60)))
    assert time.perf_counter() - started < 10
    assert load_weights(archive(tmp_path / "fine.pt", module_program("ab", 10))) == {}


def test_load_weights_module_inside_itself_is_refused(tmp_path: Path) -> None:
    program = b"\x80\x02ctorch.nn.modules.container\nSequential\n)\x81q\x00}U\x08_modules}U\x01ah\x00ssb."
    with pytest.raises(WeightsError, match=r"damaged .*\(module 'a\.' is inside itself\)"):
        load_weights(archive(tmp_path / "evil.pt", program))


def test_load_weights_many_tensors_in_one_storage_are_refused_by_their_size(tmp_path: Path) -> None:
    whole = torch.arange(2**18, dtype=torch.float32)  # 1 MiB
    torch.save({f"t{number}": whole.view(-1) for number in range(2000)}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="its tensors together are many times larger than the file"):
        load_weights(tmp_path / "evil.pt")
    torch.save({f"t{number}": whole[number:] for number in range(4)}, tmp_path / "few.pt")
    assert load_weights(tmp_path / "few.pt")["t3"][:2].tolist() == [3, 4]


def test_load_weights_storage_of_many_tensors_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(2**18, dtype=torch.float32)
    torch.save({f"t{number}": whole[number:][:1] for number in range(200)}, tmp_path / "w.pt")
    read: list[str] = []
    plain = unpickle._Archive.read
    monkeypatch.setattr(unpickle._Archive, "read", lambda self, name: (read.append(name), plain(self, name))[1])
    assert load_weights(tmp_path / "w.pt")["t199"].tolist() == [199]
    assert read.count("data/0") == 1


@pytest.mark.parametrize("program", [stack_named("os\x1b[31m", "sys\ntem"), named("o" * 10**5, "system")])
def test_load_weights_refused_name_is_shown_as_one_harmless_line(tmp_path: Path, program: bytes) -> None:
    with pytest.raises(WeightsError, match="refused: it names 'o") as caught:
        load_weights(archive(tmp_path / "evil.pt", program))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_load_weights_persistent_object_without_end_is_refused_at_once(tmp_path: Path) -> None:
    kind = b"(t" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60))  # a pair of the pair before, sixty times
    with pytest.raises(WeightsError, match=r"damaged .*\(a value of more than 10000 parts\)"):
        load_weights(archive(tmp_path / "evil.pt", b"\x80\x02(" + kind + b"NNNNtQ."))


@pytest.mark.parametrize(("head", "tail"), [(b"}", b"Ns."), (b"c__builtin__\nset\n(]", b"atR.")])  # key, element
def test_load_weights_key_that_takes_weeks_to_hash_is_refused_at_once(tmp_path: Path, head: bytes, tail: bytes) -> None:
    def program(depth: int) -> bytes:
        return b"\x80\x02" + head + b")" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(depth)) + tail

    with pytest.raises(WeightsError, match=r"damaged .*\(a value of more than 10000 parts\)"):
        load_weights(archive(tmp_path / "evil.pt", program(60)))
    with pytest.raises(WeightsError, match=r"neither a YOLOv5 checkpoint nor a state dict"):
        load_weights(archive(tmp_path / "few.pt", program(5)))


@pytest.mark.parametrize("key", [0, None, ("a",)])
def test_load_weights_state_dict_whose_keys_are_no_text_says_so(tmp_path: Path, key: object) -> None:
    torch.save({"w": torch.ones(1), key: torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(
        WeightsError, match=rf"the key.* of type {type(key).__name__} is no name of a tensor; names are"
    ):
        load_weights(tmp_path / "a.pt")


def test_load_weights_of_a_tree_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"hello": 1}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="neither a YOLOv5 checkpoint nor a state dict"):
        load_weights(tmp_path / "a.pt")
