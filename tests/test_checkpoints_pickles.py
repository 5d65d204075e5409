"""The pickles of the originals: look-alikes with their structure, and malicious ones."""

import io
import json
import os
import pickle
import sys
import types
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stylegan_fast import checkpoints
from stylegan_fast.checkpoints import CheckpointError, pickles
from stylegan_fast.models import stylegan2, stylegan3

GOLDEN = Path(__file__).parent / "golden"
SOURCE = "raise AssertionError('the source in a checkpoint was executed')\n"


# Look-alikes


@pytest.fixture
def originals(monkeypatch):
    return stand_ins(monkeypatch)


def stand_ins(monkeypatch):
    """The modules whose names the originals' pickles hold."""
    persistence = types.ModuleType("torch_utils.persistence")
    util = types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("called while loading")

    class EasyDict(dict):
        pass

    for module, item in ((persistence, _reconstruct_persistent_obj), (util, EasyDict)):
        item.__module__, item.__qualname__ = module.__name__, item.__name__
        setattr(module, item.__name__, item)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for package in ("torch_utils", "dnnlib"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    return types.SimpleNamespace(
        reconstruct=_reconstruct_persistent_obj, easy_dict=EasyDict, persistence=persistence
    )


class LookAlike(pickle.Pickler):
    """Writes modules as the originals' do: the source, the class's name and the state."""

    def __init__(self, originals, arguments, file, protocol):
        super().__init__(file, protocol)
        self.originals = originals
        self.arguments = arguments

    def reducer_override(self, obj):
        if not isinstance(obj, nn.Module):
            return NotImplemented
        of_module = nn.Module().__dict__.keys() | {"w_avg_beta", "num_ws"}
        state = {key: value for key, value in obj.__dict__.items() if key in of_module}
        state["_init_args"], state["_init_kwargs"] = self.arguments.get(id(obj), ((), {}))
        meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": type(obj).__name__,
            "state": state,
        }
        return self.originals.reconstruct, (meta,)


def pickled(originals, networks, arguments, protocol=pickle.DEFAULT_PROTOCOL, **others):
    """A network pickle. arguments: (positional, by name) of each network's constructor."""
    by_identity = {
        id(network): (given, originals.easy_dict(named))
        for network, (given, named) in zip(networks.values(), arguments)
    }
    file = io.BytesIO()
    LookAlike(originals, by_identity, file, protocol).dump({**networks, **others})
    return file.getvalue()


def loaded(folder, data):
    path = folder / "network.pkl"
    path.write_bytes(data)
    return checkpoints.load_networks(path)


def tiny_generator(**kwargs):
    torch.manual_seed(0)
    return stylegan2.Generator(5, 2, 7, 8, 3, {"num_layers": 2}, channel_base=80, **kwargs)


def tiny_discriminator(**kwargs):
    return stylegan2.Discriminator(2, 8, 3, channel_base=80, **kwargs)


TINY = dict(c_dim=2, img_resolution=8, img_channels=3)
TINY_G = dict(z_dim=5, w_dim=7, mapping_kwargs={"num_layers": 2}, **TINY)


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_recorded_images_through_a_pickle(architecture, originals, tmp_path):
    with np.load(GOLDEN / f"network_sg2_{architecture}.npz") as file:
        recorded = {name: torch.from_numpy(file[name]) for name in file.files if name != "config"}
        config = json.loads(str(file["config"]))
    networks = {"G_ema": stylegan2.Generator(**config["G"])}
    networks["D"] = stylegan2.Discriminator(**config["D"])
    for prefix, network in (("G/", networks["G_ema"]), ("D/", networks["D"])):
        state = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
        network.load_state_dict(state)
    synthesis = {k: config["G"].pop(k) for k in ("architecture", "channel_base", "channel_max")}
    config["G"]["synthesis_kwargs"] = originals.easy_dict(synthesis)

    data = pickled(originals, networks, [((), config["G"]), ((), config["D"])])
    again = loaded(tmp_path, data)
    z, c = recorded["z"], recorded.get("c")
    with torch.no_grad():
        image = again["G_ema"].eval()(
            z, c, truncation_psi=config["truncation_psi"], noise_mode="const"
        )
        logits = again["D"].eval()(recorded["img"], c)
    for actual, expected in ((image, recorded["img"]), (logits, recorded["logits"])):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("config", ["t", "r"])
def test_recorded_images_of_stylegan3_through_a_pickle(config, originals, tmp_path):
    with np.load(GOLDEN / f"network_sg3_{config}.npz") as file:
        recorded = {name: torch.from_numpy(file[name]) for name in file.files if name != "config"}
        config = json.loads(str(file["config"]))
    generator = stylegan3.Generator(**config["G"])
    state = {k.removeprefix("G/"): v for k, v in recorded.items() if k.startswith("G/")}
    generator.load_state_dict(state)
    generator.mapping.w_avg_beta = 0.995
    networks = {"G_ema": generator, "D": tiny_discriminator()}
    given = [config["G"].pop(name) for name in list(config["G"])[:5]]
    data = pickled(originals, networks, [(given, config["G"]), ((), dict(TINY, channel_base=80))])
    again = loaded(tmp_path, data)
    assert type(again["G_ema"]) is stylegan3.Generator
    with torch.no_grad():
        image = again["G_ema"].eval()(recorded["z"], None, config["truncation_psi"])
    assert (image - recorded["img"]).abs().max() <= 1e-5 * recorded["img"].abs().max()
    assert again["D"].b8.conv1.conv_clamp == 256  # of the later release, as is every StyleGAN3

    path = tmp_path / "networks.safetensors"
    checkpoints.save_networks(path, again)
    with torch.no_grad():
        saved = checkpoints.load_generator(path)(recorded["z"], None, config["truncation_psi"])
    assert torch.equal(saved, image)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_earlier_release(protocol, originals, tmp_path):
    networks = {"G": tiny_generator(), "D": tiny_discriminator(), "G_ema": tiny_generator()}
    given = (5, 2, 7, 8, 3, {"num_layers": 2}, {"channel_base": 80})
    named = dict(TINY, channel_base=80, num_fp16_res=np.int64(1), conv_clamp=np.float64(2.5))
    data = pickled(
        originals,
        networks,
        [(given, {}), ((), named), ((), dict(TINY_G, synthesis_kwargs={"channel_base": 80}))],
        protocol,
        training_set_kwargs=originals.easy_dict(class_name="training.dataset.ImageFolderDataset"),
        augment_pipe=nn.Linear(2, 3),
    )
    again = loaded(tmp_path, data)
    assert list(again) == ["G", "D", "G_ema"]
    for name, network in networks.items():
        state = network.state_dict()
        assert again[name].state_dict().keys() == state.keys()
        for key, tensor in again[name].state_dict().items():
            assert torch.equal(tensor, state[key]), key
    assert again["G"].mapping.w_avg_beta == again["G_ema"].mapping.w_avg_beta == 0.995
    assert again["G"].synthesis.b8.conv1.conv_clamp is None
    assert again["G"].synthesis.num_fp16_res == 0
    assert again["D"].b8.conv1.conv_clamp == 2.5
    assert again["D"].b8.use_fp16


def test_the_later_release(originals, tmp_path):
    networks = {"G": tiny_generator(), "D": tiny_discriminator()}
    arguments = [((), dict(TINY_G, channel_base=80)), ((), dict(TINY, channel_base=80))]
    again = loaded(tmp_path, pickled(originals, networks, arguments))
    assert again["G"].mapping.w_avg_beta == 0.998
    assert again["G"].synthesis.b8.conv1.conv_clamp == again["D"].b8.conv1.conv_clamp == 256
    assert again["G"].synthesis.num_fp16_res == 4
    assert again["G"].synthesis.b8.fused_modconv_default is True
    z, c = torch.randn(3, 5), torch.randn(3, 2)
    with torch.no_grad():
        images = [g.eval()(z, c, noise_mode="const") for g in (networks["G"], again["G"])]
    assert torch.equal(*images)


def test_a_module_saved_by_torch_save(originals, tmp_path):
    generator = tiny_generator()
    arguments = {id(generator): ((), dict(TINY_G, channel_base=80))}
    pickle_module = types.ModuleType("pickle")
    pickle_module.Pickler = type(
        "Pickler",
        (LookAlike,),
        {"__init__": partialmethod(LookAlike.__init__, originals, arguments)},
    )
    torch.save(generator, tmp_path / "model.pt", pickle_module=pickle_module)
    again = checkpoints.load_networks(tmp_path / "model.pt")["G"]
    assert torch.equal(again.mapping.fc0.weight, generator.mapping.fc0.weight)


@pytest.mark.parametrize(
    "name, prepare, message",
    [
        (
            "Generator",
            lambda g: g.synthesis.add_module("input", nn.Linear(2, 3)),
            "without synthesis.input.transform",
        ),
        ("TriPlaneGenerator", lambda g: None, "is a TriPlaneGenerator"),
        ("Generator", lambda g: delattr(g.mapping.fc0, "bias"), "without mapping.fc0.bias"),
        (
            "Generator",
            lambda g: g.mapping.fc0.register_buffer("surplus", torch.zeros(2)),
            "with mapping.fc0.surplus",
        ),
        (
            "Generator",
            lambda g: setattr(g.synthesis.b4, "const", nn.Parameter(torch.zeros(3, 4, 4))),
            r"synthesis.b4.const is \[3, 4, 4\] instead of \[20, 4, 4\]",
        ),
    ],
)
def test_other_networks(name, prepare, message, originals, tmp_path):
    generator = tiny_generator()
    generator.__class__ = type(name, (stylegan2.Generator,), {})
    prepare(generator)
    data = pickled(originals, {"G": generator}, [((), dict(TINY_G, channel_base=80))])
    with pytest.raises(CheckpointError, match=rf"network\.pkl cannot be loaded: .*{message}"):
        loaded(tmp_path, data)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(img_resolution=24), "img_resolution=24 must be a power of two"),
        (dict(img_resolution=2**40), "G: "),
        (dict(mapping_kwargs={"num_layers": 10**9}), "num_layers=1000000000 with 39 tensors"),
        (dict(surprise=1), "surprise"),
        (dict(half_dtype=[]), "half_dtype"),
        (dict(architecture=nn.Linear(1, 1)), "was given a Linear"),
        (dict(architecture=[0] * 300), "given too many values"),
        (dict(mapping_kwargs=None), "mapping_kwargs that are no dictionary"),
    ],
)
def test_malformed_arguments(arguments, message, originals, tmp_path):
    arguments = dict(TINY_G, channel_base=80) | arguments
    data = pickled(originals, {"G": tiny_generator()}, [((), arguments)])
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path, data)


# Pickles by hand


def program(*instructions):
    return b"\x80\x04" + b"".join(instructions) + b"."


def value(value):
    """The instructions that push a value."""
    return pickle.dumps(value, 3)[2:-1]


def named(module, name):
    return value(module) + value(name) + b"\x93"


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


@pytest.mark.parametrize(
    "module, message",
    [
        ("networks.generator", r"is a networks\.generator\.Generator, which this library"),
        ("dnnlib.tflib.network", "of the TensorFlow release"),
    ],
)
def test_networks_without_arguments(module, message, tmp_path):
    state = {"_modules": {}, "_parameters": {}, "_buffers": {}}
    network = named(module, "Generator") + b")\x81" + value(state) + b"b"
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path, program(b"}", value("G"), network, b"s"))


# Malicious files


LOAD = named("torch.storage", "_load_from_bytes")
SYSTEM = named("os", "system")


def legacy(*instructions):
    """A file of torch.save's older format whose value these instructions push."""
    return (
        pickles.LEGACY_MAGIC
        + value(1001).join([b"\x80\x02", b"."])
        + (program(value({"little_endian": True})) + program(*instructions) + program(b"]"))
    )


MALICIOUS = {
    "os.system": (call(SYSTEM, value("touch marker")), "refers to os.system, .* malicious"),
    "old global": (b"cos\nsystem\n" + value("touch marker") + b"\x85R", "refers to os.system"),
    "eval": (call(named("builtins", "eval"), value("open('marker', 'w')")), "to builtins.eval"),
    "getattr": (
        call(call(named("builtins", "getattr"), named("os", "path"), value("os")), value("x")),
        "refers to builtins.getattr",
    ),
    "attribute of an allowed name": (
        call(named("collections", "OrderedDict.fromkeys"), value("ab")),
        r"refers to collections.OrderedDict.fromkeys",
    ),
    "torch.load": (call(named("torch", "load"), value("marker")), "refers to torch.load"),
    "class": (
        named("subprocess", "Popen") + value(("touch marker",)) + b"\x81",
        "subprocess.Popen",
    ),
    "INST": (b"(" + value("touch marker") + b"ios\nsystem\n", "instruction INST"),
    "OBJ": (b"(" + value("touch marker") + b"o", "instruction OBJ"),
    "EXT1": (b"\x82\x01", "instruction EXT1"),
    "PERSID": (b"Pmarker\n", "instruction PERSID"),
    "BINPERSID": (value(("storage", 1, "0", "cpu", 3)) + b"Q", "refers to something outside"),
    "call of a value": (call(value("os.system"), value("touch marker")), "str where a Global"),
    "attributes of an allowed name": (
        named("builtins", "set") + value((None, {"__defaults__": ()})) + b"b",
        "a Global where a dict belongs",
    ),
    "nested": (call(LOAD, value(legacy(call(SYSTEM, value("touch marker"))))), "to os.system"),
    "nested pickle": (call(LOAD, value(program(SYSTEM))), "does not begin as"),
    "nested twice": (
        call(LOAD, value(legacy(call(LOAD, value(legacy(b"N")))))),
        "nests files in files",
    ),
    "scalar of an object": (
        call(
            named("numpy.core.multiarray", "scalar"),
            call(named("numpy", "dtype"), value("O8")),
            value(b"12345678"),
        ),
        "NumPy scalar of dtype 'O8'",
    ),
    "memo": (b"Nr\xff\xff\xff\xff", "holds no network"),
    "missing memo": (b"h\x05", "damaged"),
    "hash of tuples in tuples": (b"})" + b"2\x86" * 90 + b"Ns", "a tuple as a key"),
    "integer": (b"\x8b\x00\x00\x10\x00" + b"\x7f" * 2**20, "more than 64 bits"),
    "depth": (b")" + b"\x85" * 30_000, "holds no network"),
    "depth of lists": (b"]" * 30_000 + b"a" * 29_999, "holds no network"),
    "length": (b"\x8e" + b"\xff" * 7 + b"\x7f", "damaged"),
    "empty stack": (b"0", "damaged"),
    "nothing": (b"", "damaged"),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_pickle(name, tmp_path, monkeypatch):
    instructions, message = MALICIOUS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("executed"))
    for data in (program(instructions), legacy(instructions)):
        with pytest.raises(CheckpointError, match=rf"network\.pkl cannot be loaded: .*{message}"):
            loaded(tmp_path, data)
        if name.startswith(("BINPERSID", "nested")):
            break
    assert os.listdir(tmp_path) == ["network.pkl"]


def test_modules_inside_themselves(tmp_path):
    meta = {"class_name": "Generator", "state": {"_parameters": {}, "_buffers": {}}}
    meta["state"] |= {"_init_args": (), "_init_kwargs": TINY_G, "_modules": {"": None}}
    reconstruct = named("torch_utils.persistence", "_reconstruct_persistent_obj")
    module = call(reconstruct, value(meta)) + b"q\x63"
    state = value(meta["state"]) + value("_modules") + b"}" + value("inner") + b"h\x63ss"
    with pytest.raises(CheckpointError, match="too many modules in modules"):
        loaded(tmp_path, program(b"}", value("G"), module, state, b"bs"))


def module(parameters=b"}", modules=b"}"):
    """The instructions for a Generator of these dictionaries."""
    names = ("_parameters", "_buffers", "_modules", "_init_args", "_init_kwargs")
    parts = (parameters, b"}", modules, b")", b"}")
    state = b"}(" + b"".join(value(name) + part for name, part in zip(names, parts)) + b"u"
    meta = b"}(" + value("class_name") + value("Generator") + value("state") + state + b"u"
    return call(named("torch_utils.persistence", "_reconstruct_persistent_obj"), meta)


def many(count, item):
    """The instructions for a dictionary of one item by many names."""
    return b"}(" + b"".join(value(f"{i}") + item for i in range(count)) + b"u"


GET = b"h\x63"
EXPENSIVE = {
    "modules of many tensors": (module(many(300, b"N")), module(modules=many(300, GET))),
    "a long name of many modules": (
        module(modules=many(300, b"N")),
        module(modules=b"}" + value("n" * 3000) + GET + b"s"),
    ),
}


@pytest.mark.parametrize("name", EXPENSIVE)
def test_networks_much_larger_than_their_file(name, tmp_path):
    shared, network = EXPENSIVE[name]
    with pytest.raises(CheckpointError, match="too many modules in modules"):
        loaded(tmp_path, program(shared + b"q\x630", b"}", value("G"), network, b"s"))


@pytest.mark.parametrize("items", [list(range(1000)), tuple(range(1000)), set(range(1000))])
def test_the_same_value_in_many_calls(items, tmp_path):
    kept = (
        call(named("builtins", "set"), value(list(items))) if type(items) is set else value(items)
    )
    calls = call(named("builtins", "set"), GET) * 1000
    with pytest.raises(CheckpointError, match="uses the same values too often"):
        loaded(tmp_path, program(kept + b"q\x630", calls))


def test_the_same_arguments_of_many_calls(tmp_path):
    calls = (named("argparse", "Namespace") + GET + b"R") * 1000
    with pytest.raises(CheckpointError, match="uses the same values too often"):
        loaded(tmp_path, program(value((None,) * 100_000) + b"q\x630", calls))


def test_a_long_name_of_a_class(tmp_path):
    long_name = value("networks." + "n" * 1000) + b"q\x630"
    with pytest.raises(CheckpointError, match="by a very long name"):
        loaded(tmp_path, program(long_name, GET + value("x") + b"\x93"))


STORAGE = value(torch.arange(6.0).__reduce_ex__(3)[1][0])


def rebuilt(*geometry):
    """What a pickle holds whose tensor lies so (offset, size, stride) in a storage of 0, …, 5."""
    function = named("torch._utils", "_rebuild_tensor_v2")
    flags = [value(False), b"}"]
    return pickles.read_pickle(program(call(function, STORAGE, *map(value, geometry), *flags)))


def test_tensors_lie_in_their_storage():
    assert rebuilt(1, (2, 2), (1, 2)).load().tolist() == [[1, 3], [2, 4]]
    assert rebuilt(6, (3, 0), (1, 1)).load().shape == (3, 0)
    assert rebuilt(5, (), ()).load().tolist() == 5


@pytest.mark.parametrize(
    "geometry",
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (6, (), ()),
        (0, (2, 3), (4, 1)),
        (0, (2, 2), (1,)),
        (0, (7,), (0,)),
        (0, (0, 2**62, 2**62), (1, 1, 1)),
        (0, (1,) * 9, (1,) * 9),
        (0, (2**31, 2**31), (0, 0)),
        (0, (3, 2**62), (2**62, 1)),
        (-1, (2,), (1,)),
        (3, (2,), (-1,)),
        (0, (-2, -3), (1, 1)),
        (0, (1.0,), (1,)),
        (0, 6, (1,)),
    ],
)
def test_tensors_outside_of_their_storage(geometry):
    with pytest.raises(
        CheckpointError, match=r"does not fit into 6|belongs|cannot be made|sizes and"
    ):
        rebuilt(*geometry).load()


def test_many_tensors_of_one_storage():
    tensor = rebuilt(0, (6,), (1,))
    assert all(torch.equal(tensor.load(), torch.arange(6.0)) for _ in range(100))
    with pytest.raises(CheckpointError, match="share their memory"):
        [tensor.load() for _ in range(1000)]


@pytest.fixture(scope="module")
def network_pickle():
    with pytest.MonkeyPatch.context() as patch:
        generator = stylegan2.Generator(3, 0, 3, 8, 3, {"num_layers": 1}, channel_base=16)
        arguments = dict(z_dim=3, c_dim=0, w_dim=3, img_resolution=8, img_channels=3)
        arguments.update(mapping_kwargs={"num_layers": 1}, channel_base=16)
        return pickled(stand_ins(patch), {"G": generator}, [((), arguments)])


def test_truncated_pickles(network_pickle, tmp_path):
    for length in np.linspace(1, len(network_pickle) - 1, 60, dtype=int):
        with pytest.raises(CheckpointError, match="incomplete"):
            loaded(tmp_path, network_pickle[:length])


def test_damaged_pickles(network_pickle, tmp_path):
    """Whatever byte changes: a network or a CheckpointError."""
    random = np.random.default_rng(0)
    refused = 0
    for position in random.choice(len(network_pickle), 100, replace=False):
        data = bytearray(network_pickle)
        data[position] ^= 1 << random.integers(8)
        try:
            loaded(tmp_path, data)
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_names_in_messages_are_short_and_printable(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        loaded(tmp_path, program(named("os\x1b[31m\n", "x" * 10_000)))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
