"""The one door for tensors that users send: word vectors as base64 of `torch.save`, or of safetensors.

vLLM's `prompt_embeds` is the first form, which is a zip file with a pickle in it. It is read with `weights_only`, and
only if the pickle is, to the opcode, what `torch.save` writes for one plain tensor: no other name, no large number that
is not of a size, no compressed or doubled entry (a few kilobytes could become gigabytes). Then shape, type and every
value are checked. Whatever is wrong is one sentence (ValueError); nothing else comes out of here.

Sizes are bounded before anything of that size is made: of the text, the archive's entries, the tensor.
"""

import base64
import binascii
import io
import pickle
import pickletools
import zipfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PICKLE_BYTES = 4096  # that of a plain tensor has about 160
_ENTRIES = 16  # it has 7 in torch 2.13
_GLOBALS = {
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "torch HalfStorage",
    "torch BFloat16Storage",
    "collections OrderedDict",
}
_OPCODES = {
    *("PROTO", "GLOBAL", "BINPUT", "MARK", "BINUNICODE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"),
    *("BINPERSID", "BININT", "BININT1", "BININT2", "NEWFALSE", "NEWTRUE", "REDUCE", "STOP"),
}
_DTYPES = ("float32", "float16", "bfloat16")


def decode_vectors(text: str, *, width: int, longest: int) -> "torch.Tensor":
    """(T, `width`) word vectors, T of 1 to `longest`, float32, float16 or bfloat16, all finite.

    Raises ValueError: what was found, what is expected.
    """
    most = longest * width * 4
    if len(text) > most * 2 + 65_536:
        raise ValueError(f"{len(text):,} characters are more than {longest} vectors of {width} values take.")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64. Send base64 of torch.save or of safetensors.") from None
    tensor = _load_zip(raw, most) if raw[:2] == b"PK" else _load_safetensors(raw)
    return _checked(tensor, width, longest)


def encode_vectors(vectors: "torch.Tensor") -> str:
    """Base64 of safetensors, for `decode_vectors`."""
    from safetensors.torch import save

    return base64.b64encode(save({"prompt_embeds": vectors.detach().cpu().contiguous()})).decode()


def _load_zip(raw: bytes, most: int) -> "torch.Tensor":
    import torch

    _check_archive(raw, most)
    try:
        tensor = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, ValueError, TypeError, KeyError, OverflowError, EOFError) as error:
        raise ValueError(f"torch does not read it ({_line(error)}).") from None
    if type(tensor) is not torch.Tensor:
        raise ValueError(f"a {type(tensor).__name__}; expected one tensor.")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.untyped_storage().nbytes() > len(raw):
        raise ValueError("the tensor is sparse, or larger than its bytes. Send a plain dense one.")
    return tensor


def _check_archive(raw: bytes, most: int) -> None:
    """Raises ValueError unless this is what `torch.save` writes for a plain tensor of at most `most` bytes."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len(entries) > _ENTRIES or len(set(names)) < len(names):
                raise ValueError("its archive has too many entries, or one twice.")
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                raise ValueError("its archive is compressed or encrypted; torch.save writes neither.")
            if sum(entry.file_size for entry in entries) > min(len(raw), most + 65_536):
                raise ValueError("its archive holds more than the tensor that it is to be.")
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _PICKLE_BYTES:
                raise ValueError("it holds more than one plain tensor.")
            pickled = archive.read(pickles[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, OverflowError):
        raise ValueError("a damaged archive. Send base64 of torch.save or of safetensors.") from None
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            is_known = opcode.name in _OPCODES and (opcode.name != "GLOBAL" or argument in _GLOBALS)
            if not is_known:
                raise ValueError("it holds something else than one plain float tensor.")
    except (ValueError, UnicodeDecodeError, EOFError, IndexError) as error:
        is_ours = str(error).startswith("it holds")
        raise ValueError(str(error) if is_ours else "its pickle is damaged.") from None


def _load_safetensors(raw: bytes) -> "torch.Tensor":
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, torch.Tensor] = load(raw)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError, TypeError, AttributeError) as error:
        raise ValueError(f"neither torch.save's zip format nor safetensors ({_line(error)}).") from None
    if len(tensors) != 1:
        raise ValueError(f"{len(tensors)} tensors; expected one.")
    return next(iter(tensors.values()))


def _checked(tensor: "torch.Tensor", width: int, longest: int) -> "torch.Tensor":
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    if tensor.ndim != 2 or shape[1] != width:
        raise ValueError(f"its shape is {_short(shape)}; expected (tokens, {width}).")
    if dtype not in _DTYPES:
        raise ValueError(f"its type is {dtype}; expected one of {', '.join(_DTYPES)}.")
    if not 1 <= shape[0] <= longest:
        raise ValueError(f"{shape[0]} vectors; expected 1 to {longest}.")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("some of its values are not finite.")
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _short(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 4 else f"{len(shape)} numbers"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
