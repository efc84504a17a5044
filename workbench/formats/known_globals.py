"""The globals that a pickle may name: which are plain data, which are harmless strangers, and what is said of the others.

Owns the exact allow-list and the words for every name. Names are compared whole, and nothing but these tables makes a name
plain or harmless; the table of dangerous modules only explains a verdict that stands without it.

Source: torch 2.13 torch/_weights_only_unpickler.py (what is plain); the classes' own modules for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal

from workbench.checkpoint import Finding
from workbench.dtypes import DTYPES
from workbench.formats.pickle_vm import Machine
from workbench.tables import shorten
from workbench.tree import NOTHING, Global, Inert, is_mapping, items_of

STORAGE_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "LongStorage": "int64",
    "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64", "QInt8Storage": "qint8", "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
}  # fmt: skip
# what torch's C++ pickler writes besides, into TorchScript archives
_ONLY_CPP = (
    "ComplexHalf:complex32 UInt16:uint16 UInt32:uint32 UInt64:uint64 Float8_e4m3fn:float8_e4m3fn Float8_e5m2:float8_e5m2"
    " Float8_e4m3fnuz:float8_e4m3fnuz Float8_e5m2fnuz:float8_e5m2fnuz Float8_e8m0fnu:float8_e8m0fnu Float4_e2m1fn_x2:float4_e2m1fn_x2"
    " Bits8:bits8 Bits16:bits16 Bits1x8:bits1x8 Bits2x4:bits2x4 Bits4x2:bits4x2"
)
ALL_STORAGE_DTYPES = STORAGE_DTYPES | {f"{cls}Storage": dtype for cls, _, dtype in (word.partition(":") for word in _ONLY_CPP.split())}
_TENSOR_TYPES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")

_TOLD_SINGLY = 100  # dangers of one pickle

Verdict = Literal["plain", "data class", "unknown", "dangerous"]
Names = Collection[str] | Callable[[Global], bool]  # what is plain in one container, by its dotted name


def _named(text: str) -> list[str]:
    """Dotted names from "module: name name; module: name"; a `#` in a name stands for 1, 2 and 3."""
    text = re.sub(r"[^\s;]*#[^\s;]*", lambda m: " ".join(m[0].replace("#", d) for d in "123"), text)
    groups = (group.partition(":") for group in text.split(";"))
    return [f"{module.strip()}.{name}" for module, _, names in groups for name in names.split()]


_PLAIN = {
    "a container, number or byte string of Python's own": "_codecs: encode; builtins: bytearray complex set; collections: Counter OrderedDict",
    "a part of a tensor: its size, device, layout, scale or wrapper": "torch: Size Tensor device per_channel_affine per_channel_affine_float_qparams"
    " per_channel_symmetric per_tensor_affine per_tensor_symmetric; torch.nn.parameter: Parameter; torch.serialization: _get_layout",
    "puts a tensor together from its storage": "torch._tensor: _rebuild_from_type_v2; torch._utils: _rebuild_device_tensor_from_cpu_tensor"
    " _rebuild_device_tensor_from_numpy _rebuild_meta_tensor_no_storage _rebuild_nested_tensor _rebuild_parameter _rebuild_parameter_with_state"
    " _rebuild_qtensor _rebuild_sparse_tensor _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_wrapper_subclass",
    "an element type": "torch: " + " ".join([*DTYPES, *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8))]),
    "a kind of storage": f"torch.storage: TypedStorage UntypedStorage; torch: {' '.join(STORAGE_DTYPES)};"
    f"torch.cuda: {' '.join(name for name in STORAGE_DTYPES if not name.startswith('Q'))}",
    "a kind of tensor": ";".join(
        f"torch{where}{sparse}: {' '.join(f'{kind}Tensor' for kind in _TENSOR_TYPES if not (sparse and kind == 'Bool'))}"
        for where in ("", ".cuda") for sparse in ("", ".sparse")
    ),
}  # fmt: skip
_WHY_PLAIN = {dotted: why for why, names in _PLAIN.items() for dotted in _named(names)}
PLAIN = frozenset(_WHY_PLAIN)

# what weights_only refuses and what yet does no harm, by how it may be used:
#   call: called with anything · new: made empty and then filled, as pickle does with objects · name: referred to only
_HARMLESS: tuple[tuple[Literal["call", "new", "name"], str, str], ...] = (
    ("call", "a value of Python's own; making one only stores its parts",
     "builtins: Ellipsis NotImplemented bool bytes dict float frozenset int list object range slice str tuple; copyreg: _reconstructor;"
     "argparse: Namespace; types: SimpleNamespace; typing: Any; collections: defaultdict deque; decimal: Decimal; fractions: Fraction;"
     "datetime: date datetime time timedelta timezone; uuid: UUID;"
     + ";".join(f"{m}: Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath" for m in ("pathlib", "pathlib._local"))),
    ("call", "a NumPy array, number, element type or random state; making one copies bytes and no more",
     "numpy: dtype matrix ndarray record recarray bool_ complex64 complex128 float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64;"
     "numpy.rec: recarray record; numpy.ma: MaskedArray; numpy.ma.core: MaskedArray _mareconstruct;"
     + ";".join(f"numpy.{core}.multiarray: _reconstruct scalar; numpy.{core}.numeric: _frombuffer" for core in ("core", "_core"))
     + ";numpy.random._pickle: __bit_generator_ctor __generator_ctor __randomstate_ctor; numpy.random._mt19937: MT19937;"
     "numpy.random._pcg64: PCG64 PCG64DXSM; numpy.random._philox: Philox; numpy.random._sfc64: SFC64;"
     "numpy.random.bit_generator: SeedSequence __pyx_unpickle_SeedSequence"),
    ("call", "a record of torch's own that describes how tensors are cut and stored",
     "torch.distributed.checkpoint.metadata: BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties"
     " TensorStorageMetadata _MEM_FORMAT_ENCODING; torch.distributed.checkpoint.filesystem: _StorageInfo;"
     "torch.distributed._shard.sharded_tensor.metadata: MEM_FORMAT_ENCODING TensorProperties;"
     "torch.distributed.tensor: DTensor; torch.distributed.tensor._dtensor_spec: DTensorSpec ShardOrderEntry TensorMeta;"
     "torch.distributed.tensor.placement_types: Partial Replicate Shard _StridedShard; torch.distributed._mesh_layout: _FlatLayout _MeshLayout;"
     "torch.distributed.device_mesh: DeviceMesh; torch._dynamo.decorators: _DimRange; torch.nested._internal.nested_tensor: NestedTensor _rebuild_njt; torch.nn.parameter: Buffer UninitializedBuffer UninitializedParameter"),
    ("new", "a layer or loss of torch.nn, made empty and filled; nothing of it runs before the model is called",
     "torch.nn.modules.activation: CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid LogSoftmax Mish"
     " MultiheadAttention PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold;"
     "torch.nn.modules.adaptive: AdaptiveLogSoftmaxWithLoss; torch.nn.modules.batchnorm: BatchNorm#d LazyBatchNorm#d SyncBatchNorm;"
     "torch.nn.modules.channelshuffle: ChannelShuffle; torch.nn.modules.container: ModuleDict ModuleList ParameterDict ParameterList Sequential;"
     "torch.nn.modules.conv: Conv#d ConvTranspose#d LazyConv#d LazyConvTranspose#d; torch.nn.modules.distance: CosineSimilarity PairwiseDistance;"
     "torch.nn.modules.dropout: AlphaDropout Dropout Dropout#d FeatureAlphaDropout; torch.nn.modules.flatten: Flatten Unflatten;"
     "torch.nn.modules.fold: Fold Unfold; torch.nn.modules.instancenorm: InstanceNorm#d LazyInstanceNorm#d;"
     "torch.nn.modules.linear: Bilinear Identity LazyLinear Linear NonDynamicallyQuantizableLinear;"
     "torch.nn.modules.loss: BCELoss BCEWithLogitsLoss CTCLoss CosineEmbeddingLoss CrossEntropyLoss GaussianNLLLoss HingeEmbeddingLoss HuberLoss"
     " KLDivLoss L1Loss MSELoss MarginRankingLoss MultiLabelMarginLoss MultiLabelSoftMarginLoss MultiMarginLoss NLLLoss NLLLoss2d PoissonNLLLoss"
     " SmoothL1Loss SoftMarginLoss TripletMarginLoss TripletMarginWithDistanceLoss; torch.nn.modules.module: Module;"
     "torch.nn.modules.normalization: CrossMapLRN2d GroupNorm LayerNorm LocalResponseNorm RMSNorm;"
     "torch.nn.modules.padding: CircularPad#d ConstantPad#d ReflectionPad#d ReplicationPad#d ZeroPad#d; torch.nn.modules.pixelshuffle: PixelShuffle"
     " PixelUnshuffle; torch.nn.modules.pooling: AdaptiveAvgPool#d AdaptiveMaxPool#d AvgPool#d FractionalMaxPool2d FractionalMaxPool3d LPPool#d"
     " MaxPool#d MaxUnpool#d; torch.nn.modules.rnn: GRU GRUCell LSTM LSTMCell RNN RNNCell; torch.nn.modules.sparse: Embedding EmbeddingBag;"
     "torch.nn.modules.transformer: Transformer TransformerDecoder TransformerDecoderLayer TransformerEncoder TransformerEncoderLayer;"
     "torch.nn.modules.upsampling: Upsample UpsamplingBilinear2d UpsamplingNearest2d; torch.nn.parallel.data_parallel: DataParallel"),
    ("new", "a hook of torch.nn.utils that a layer runs before its forward, made empty and filled",
     "torch.nn.utils.weight_norm: WeightNorm; torch.nn.utils.spectral_norm: SpectralNorm; torch.nn.utils.prune: CustomFromMask Identity"
     " L1Unstructured LnStructured PruningContainer RandomStructured RandomUnstructured"),
    ("new", "an optimizer, schedule or averaged model of torch, made empty and filled",
     "torch.optim.adadelta: Adadelta; torch.optim.adagrad: Adagrad; torch.optim.adam: Adam; torch.optim.adamax: Adamax; torch.optim.adamw: AdamW;"
     "torch.optim.asgd: ASGD; torch.optim.lbfgs: LBFGS; torch.optim.nadam: NAdam; torch.optim.radam: RAdam; torch.optim.rmsprop: RMSprop;"
     "torch.optim.rprop: Rprop; torch.optim.sgd: SGD; torch.optim.sparse_adam: SparseAdam; torch.optim.swa_utils: AveragedModel SWALR;"
     "torch.optim.lr_scheduler: ChainedScheduler ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts CyclicLR ExponentialLR LambdaLR LinearLR"
     " MultiStepLR MultiplicativeLR OneCycleLR PolynomialLR ReduceLROnPlateau SequentialLR StepLR"),
    ("name", "a function of torch that computes on tensors; it is only referred to",
     "torch._C._nn: gelu softplus log_sigmoid; torch.nn.functional: celu elu glu hardswish hardtanh leaky_relu log_softmax mish relu relu6 selu sigmoid"
     " silu softmax softsign tanh tanhshrink"),
    ("call", "a setting of Hugging Face transformers or accelerate: one of a fixed set of words, or a record of them",
     "transformers.trainer_utils: FSDPOption HubStrategy IntervalStrategy SaveStrategy SchedulerType; transformers.training_args: OptimizerNames ParallelMode;"
     "transformers.debug_utils: DebugOption; transformers.trainer_pt_utils: AcceleratorConfig; accelerate.utils.dataclasses: DistributedType DynamoBackend"),
    ("new", "settings of a training run by Hugging Face, Lightning or OmegaConf, made empty and filled; importing their library runs its own code",
     "transformers.training_args: TrainingArguments; transformers.training_args_seq2seq: Seq2SeqTrainingArguments; accelerate.state: PartialState;"
     "omegaconf.base: ContainerMetadata Metadata; omegaconf.dictconfig: DictConfig; omegaconf.listconfig: ListConfig;"
     "omegaconf.nodes: AnyNode BooleanNode BytesNode FloatNode IntegerNode InterpolationResultNode PathNode StringNode;"
     "pytorch_lightning.utilities.parsing: AttributeDict; lightning.pytorch.utilities.parsing: AttributeDict;"
     "lightning_fabric.utilities.data: AttributeDict; lightning.fabric.utilities.data: AttributeDict"),
    ("name", "a callback of Lightning that labels its state; it is only referred to",
     "pytorch_lightning.callbacks.model_checkpoint: ModelCheckpoint; pytorch_lightning.callbacks.early_stopping: EarlyStopping"),
)  # fmt: skip
_RANDOM = frozenset(_named("numpy.random._pickle: __bit_generator_ctor __generator_ctor __randomstate_ctor"))
_ARRAYS = frozenset(_named("numpy: matrix ndarray record recarray; numpy.rec: recarray; numpy.ma: MaskedArray; numpy.ma.core: MaskedArray"))
_CALLED_BY_PICKLE = frozenset({"append", "extend", "add", "__setstate__", "__setitem__", "__reduce__", "__reduce_ex__", "__getattr__"})
_ELEMENT = re.compile(r"[<>=|]?[biufcSUVmMO]\d*|\?")
NESTED = "torch.storage._load_from_bytes"  # loads a whole pickle
WRAPPER = "torch._tensor._rebuild_from_type_v2"  # plain, and calls its first argument
STATEFUL = frozenset({WRAPPER, "torch._utils._rebuild_parameter_with_state"})  # plain, and give their last argument as a state
HARMLESS = {dotted: (rule, why) for rule, why, names in _HARMLESS for dotted in _named(names)}
_RULED = frozenset(dotted for dotted, (rule, _) in HARMLESS.items() if rule != "call") | _RANDOM | _ARRAYS
_RULED |= {"numpy.dtype", "copyreg._reconstructor", "collections.defaultdict"}
_BASES = frozenset(_named("builtins: object dict list tuple set frozenset int float str"))  # _reconstructor may make, defaultdict call them

_DANGERS = {
    "runs commands, or changes files and processes": "os posix nt posixpath ntpath subprocess pty popen2 commands platform multiprocessing asyncio",
    "evaluates text, imports modules, opens files or reaches any attribute": "builtins __builtin__ sys inspect types gc",
    "imports or runs any code": "importlib imp runpy pkgutil zipimport site pydoc test unittest doctest idlelib lib2to3 torch.package torch.jit",
    "evaluates text as a program": "code codeop bdb pdb timeit profile cProfile trace sympy pandas.eval numexpr torch.fx torch._inductor torch.utils.cpp_extension",
    "unpickles, or makes code from bytes, without restriction": "pickle _pickle marshal shelve dill cloudpickle joblib pandas torch.load torch.storage torch.serialization",
    "calls whatever it is given, or reaches any attribute": "operator functools itertools dataclasses copy copyreg weakref contextlib",
    "runs native code": "ctypes _ctypes cffi mmap numpy.f2py numpy.distutils numpy.testing torch.ops torch.utils.data torch.classes",
    "talks to other machines": "socket ssl http urllib urllib2 requests httpx aiohttp ftplib imaplib poplib smtplib telnetlib xmlrpc webbrowser torch.hub torch.distributed",
    "reads or writes files": "io _io shutil tempfile pathlib glob fileinput linecache zipfile tarfile sqlite3 logging numpy",
    "installs packages": "pip ensurepip setuptools distutils venv",
}  # fmt: skip
_DANGEROUS = {module: why for why, modules in _DANGERS.items() for module in modules.split()}


def judge(found: Global, misuse: str | None = None, also: Names = ()) -> tuple[Verdict, str]:
    """The verdict on one global, and why. `misuse`: how a harmless one is used in a way that is not; `also` names what is plain here."""
    dotted = found.dotted
    if dotted in PLAIN:
        return "plain", _WHY_PLAIN[dotted]
    if (also(found) if callable(also) else dotted in also) and (dotted != NESTED or misuse is None):
        return "plain", "a name of this container's own, which its reader does not import"
    if dotted in HARMLESS and misuse is None:
        return "data class", HARMLESS[dotted][1]
    if misuse is not None:
        return "dangerous", misuse
    if found.module == "copyreg" and found.name.startswith("extension "):
        return "dangerous", "stands for whatever this process registered under that number"
    parts = dotted.split(".")
    why = next((_DANGEROUS[head] for n in range(len(parts), 0, -1) if (head := ".".join(parts[:n])) in _DANGEROUS), None)
    if "." in found.name:
        return "dangerous", f"reaches through {found.module} to something else" + (f", and that module {why}" if why else "")
    if why is not None:
        return "dangerous", f"belongs to a module that {why}"
    return "unknown", f"is not known: importing {found.module} runs its code, and building the object runs the class's own"


def misuses(made: Collection[Inert], named: Iterable[Global], states: Iterable[Any] = ()) -> dict[str, str]:
    """Harmless names, of those that a pickle names, that its calls use in a way that is not harmless, and how. `states`: of any objects."""
    out, patience = dict[str, str](), _Patience()
    states = [*states, *(node.args[-1] for node in made if node.dotted in STATEFUL and isinstance(node.args, tuple) and node.args)]
    if any(found.dotted == NESTED for found in named) and _is_handed_on(NESTED, made, states):
        out[NESTED] = "is handed on as a value, and whatever calls it may give it any bytes to load"
    for state in states:
        for half in state if isinstance(state, tuple) else (state,):
            entries = items_of(half) if is_mapping(half) else {}
            for key in _CALLED_BY_PICKLE if entries else ():
                if isinstance(value := entries.get(key), Global):
                    out[value.dotted] = f"is put where pickle calls it, as {key}"
    for node in _with_inner_calls(made):
        dotted = node.dotted
        if dotted not in _RULED:
            continue
        rule, args = HARMLESS[dotted][0], node.args if isinstance(node.args, tuple) else ()
        if rule == "name":
            out[dotted] = "is only harmless where it is not called, and here it is"
        elif rule == "new" and (not node.new or node.args or node.kwargs):
            out[dotted] = "is only harmless where it is made empty, and here it is called with arguments"
        elif dotted in _RANDOM and not (len(args) <= 1 and all(map(_is_random, args))):
            out[dotted] = "calls what it is given, and that is more than the name of a generator"
        elif dotted in _ARRAYS:
            out[dotted] = "is only harmless where NumPy's own functions make it, and here it is called"
        elif dotted == "numpy.dtype" and not (args and _is_element(args[0])):
            out[dotted] = "is made from something that is no code of an element type"
        elif dotted == "copyreg._reconstructor" and not (len(args) == 3 and _is_base(args[1])):
            out[dotted] = "makes an object by the rules of a class that is no plain container"
        elif dotted == "collections.defaultdict" and args and args[0] is not None and not _is_base(args[0]):
            out[dotted] = "calls its first argument for every missing key, and that is no plain container"
        elif dotted == "numpy.dtype" and node.state is not NOTHING and not _is_honest(node, patience):
            out[dotted] = "is told flags that are not its own: NumPy would take bytes of the file for addresses of objects"
    return out


def _with_inner_calls(made: Iterable[Inert]) -> Iterator[Inert]:
    """The calls, and those that torch's wrapper of tensor subclasses makes of its first and third argument."""
    for node in made:
        yield node
        if node.dotted == WRAPPER and isinstance(node.args, tuple) and len(node.args) == 4 and isinstance(node.args[0], Global):
            yield Inert(node.args[0], node.args[2])


def _is_handed_on(dotted: str, made: Iterable[Inert], states: Iterable[Any]) -> bool:
    """Whether a name stands in what calls are given, or in a state: in whatever these hold, each part looked into once."""
    pending, seen = [*states, *(held for node in made for held in _parts(node))], set[int]()
    while pending:
        node = pending.pop()
        if isinstance(node, Global):
            if node.dotted == dotted:
                return True
        elif isinstance(node, (dict, list, tuple, set, frozenset)) and id(node) not in seen:
            seen.add(id(node))
            pending += node.values() if isinstance(node, dict) else node
        elif isinstance(node, Inert) and id(node) not in seen:
            seen.add(id(node))
            pending += _parts(node)
    return False


def _parts(node: Inert) -> list[Any]:
    return [held for held in (node.args, node.kwargs, node.state, node.items, node.elements) if held]


def _is_element(value: object) -> bool:
    """Whether a numpy.dtype is made from a code, or from the class of records, whose fields its state tells."""
    if isinstance(value, Global):
        return value.dotted == "numpy.record"
    return isinstance(value, str) and len(value) < 32 and _ELEMENT.fullmatch(value) is not None


def _is_random(value: object) -> bool:
    if isinstance(value, Inert):
        value = value.func
    return isinstance(value, str) or (isinstance(value, Global) and value.dotted in HARMLESS and value.module.startswith("numpy.random"))


def _is_base(value: object) -> bool:
    return isinstance(value, Global) and value.dotted in _BASES


class _Patience:
    """How many element types are looked into before the rest are taken for dishonest."""

    left = 100_000


def _is_honest(dtype: Inert, patience: _Patience) -> bool:
    """Whether the flags (the eighth part of the state) say "holds objects" just where the type, its fields or its items do."""
    state = dtype.state
    if not (isinstance(state, tuple) and len(state) >= 8 and isinstance(state[7], int)):
        return False
    holds, pending, seen = False, [dtype], set[int]()
    while pending and not holds:
        node = pending.pop()
        if not isinstance(node, Inert) or not isinstance(node.args, tuple) or id(node) in seen:
            continue
        seen.add(id(node))
        holds = bool(node.args and isinstance(node.args[0], str) and node.args[0][:32].lstrip("<>=|").startswith("O"))
        if isinstance(node.state, tuple) and len(node.state) >= 8:  # (type, shape) of the items, (type, offset) of each field
            fields = node.state[4] if isinstance(node.state[4], dict) else {}
            patience.left -= 1 + len(fields)
            if patience.left < 0:
                return False
            pending += [part[0] for part in (node.state[2], *fields.values()) if isinstance(part, tuple) and part]
    return bool(state[7] & 1) == holds


def _preview(args: Any) -> str:
    """The arguments of a call, as far as they are short and plain."""
    shown = []
    for arg in args[:3] if isinstance(args, tuple) else ():
        texts = arg if isinstance(arg, (list, tuple)) and len(arg) < 9 and all(isinstance(item, str) for item in arg) else None
        simple = isinstance(arg, (str, bytes, bool, float)) or (isinstance(arg, int) and arg.bit_length() < 64)
        short = arg[:200] if isinstance(arg, (str, bytes)) else [text[:80] for text in texts] if texts else arg
        shown.append(shorten(repr(short), 80) if simple or texts else f"a {type(arg).__name__}")
    return f"({', '.join(shown)}{', …' if isinstance(args, tuple) and len(args) > 3 else ''})"


def danger_findings(
    machine: Machine, made: Collection[Inert] = (), also: Names = (), misused: Mapping[str, str] | None = None
) -> list[Finding]:
    """One finding for each global that is dangerous or unknown, with where it stands and whether it would be called; one for all harmless
    strangers together; one for each call of something that is no global. `made` are the calls of strangers that the machine met, and
    `misused` their `misuses`, where these are known.
    """
    misused = misuses(made, machine.globals, machine.states) if misused is None else misused
    given = {node.dotted: node.args for node in reversed(list(made)) if node.args}
    out, harmless = list[Finding](), dict[str, int]()
    for count, (found, offset) in enumerate(machine.globals.items()):
        if len(out) == _TOLD_SINGLY:
            message = f"the pickle names {len(machine.globals) - count} more, not told one by one"
            out.append(Finding("forbidden global", "danger", message, {"offset": offset}))
            break
        verdict, why = judge(found, misused.get(found.dotted), also)
        if verdict == "data class":
            harmless[found.dotted] = offset
        elif verdict != "plain":
            called = "would call" if found.dotted in machine.calls else "refers to"
            with_what = f" with {_preview(given[found.dotted])}" if found.dotted in given else ""
            message = f"the pickle {called} {found.dotted}{with_what}, which {why}; it was not imported"
            hint = 'the values stay readable here; wb.save(ckpt, path, unsafe="drop") writes a file without it'
            out.append(Finding("forbidden global", "danger", message, {"global": found.dotted, "offset": offset}, hint))
    named = {found.dotted for found in machine.globals} | {"torch.Tensor.__setstate__"}
    others = ((dotted, offset) for dotted, offset in machine.calls.items() if dotted not in named)
    for dotted, offset in islice(others, _TOLD_SINGLY):
        out.append(Finding("forbidden call", "danger", f"the pickle asks for {dotted}; it was not carried out", {"offset": offset}))
    if harmless:
        shown = ", ".join(list(harmless)[:4]) + (f" and {len(harmless) - 4} more" if len(harmless) > 4 else "")
        message = f"the pickle also builds known, harmless classes: {shown}"
        hint = "plain torch.load needs them allowed; the report of wb.scan(path) ends with the lines for it, where they suffice"
        out.append(Finding("data classes", "info", message, {"globals": list(harmless)}, hint))
    return out
