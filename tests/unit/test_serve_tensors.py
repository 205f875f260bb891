"""The door for tensors: what vLLM's clients send comes in, and nothing else does."""

import base64
import io
import pickle
import zipfile
from typing import Any

import pytest
import torch
from safetensors.torch import save

from odqa.serve.tensors import decode_vectors, encode_vectors

WIDTH, LONGEST = 4, 8


def saved(value: Any, **options: Any) -> bytes:
    held = io.BytesIO()
    torch.save(value, held, **options)
    return held.getvalue()


def read(raw: bytes) -> torch.Tensor:
    return decode_vectors(base64.b64encode(raw).decode(), width=WIDTH, longest=LONGEST)


def rezipped(raw: bytes, change: dict[str, bytes] | None = None, **options: Any) -> bytes:
    """The archive again, with other content of some entries, or compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as archive, zipfile.ZipFile(out, "w", **options) as new:
        for entry in archive.infolist():
            name = entry.filename
            new.writestr(name, (change or {}).get(name.partition("/")[2], archive.read(name)))
    return out.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_forms_come_in_as_they_were_sent(dtype: torch.dtype) -> None:
    vectors = torch.randn(3, WIDTH).to(dtype)
    for found in (read(saved(vectors)), read(save({"any": vectors})), read(saved(vectors.clone().requires_grad_()))):
        assert torch.equal(found, vectors) and found.dtype == dtype and not found.requires_grad
    assert torch.equal(decode_vectors(encode_vectors(vectors), width=WIDTH, longest=LONGEST), vectors)
    turned = torch.randn(WIDTH, 3).T
    assert torch.equal(read(saved(turned)), turned), "not contiguous"


class Nasty:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def bomb() -> bytes:
    """Two megabytes of zeros in a few kilobytes."""
    return rezipped(saved(torch.zeros(3, WIDTH)), {"data/0": b"\0" * (2 << 20)}, compression=zipfile.ZIP_DEFLATED)


def overstated() -> bytes:
    """A pickle that says 60,000 values where 12 are."""
    raw = saved(torch.zeros(3, WIDTH))
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        pickled = archive.read("archive/data.pkl")
    return rezipped(
        raw, {"data.pkl": pickled.replace(b"K\x0c", b"M\x60\xea", 1).replace(b"K\x03K\x04", b"M\x98\x3aK\x04", 1)}
    )


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "neither torch.save's zip format nor safetensors"),
    "noise": (b"\x80\x04noise", "neither torch.save's zip format nor safetensors"),
    "a pickle": (pickle.dumps(Nasty()), "neither torch.save's zip format nor safetensors"),
    "a pickle in the archive": (
        rezipped(saved(torch.zeros(3, WIDTH)), {"data.pkl": pickle.dumps(Nasty(), protocol=2)}),
        "something else than one plain float tensor",
    ),
    "the old format": (
        saved(torch.zeros(3, WIDTH), _use_new_zipfile_serialization=False),
        "neither torch.save's zip format nor safetensors",
    ),
    "half an archive": (saved(torch.zeros(3, WIDTH))[:200], "a damaged archive"),
    "a bomb": (bomb(), "compressed"),
    "overstated": (overstated(), "record size|more than|larger than|torch does not read it"),
    "a dictionary": (saved({"a": torch.zeros(3, WIDTH)}), "something else than one plain float tensor"),
    "whole numbers": (saved(torch.zeros(3, WIDTH, dtype=torch.long)), "something else than one plain float tensor"),
    "double": (save({"a": torch.zeros(3, WIDTH, dtype=torch.float64)}), "its type is float64"),
    "sparse": (saved(torch.eye(WIDTH).to_sparse()), "something else than one plain float tensor"),
    "two tensors": (save({"a": torch.zeros(1, WIDTH), "b": torch.zeros(1, WIDTH)}), "2 tensors; expected one"),
    "no tensor": (save({}), "0 tensors; expected one"),
    "one dimension": (saved(torch.zeros(WIDTH)), r"its shape is \(4,\); expected \(tokens, 4\)"),
    "three dimensions": (saved(torch.zeros(1, 3, WIDTH)), "its shape is"),
    "another width": (saved(torch.zeros(3, WIDTH + 1)), r"its shape is \(3, 5\)"),
    "no vectors": (saved(torch.zeros(0, WIDTH)), "0 vectors; expected 1 to 8"),
    "too many": (saved(torch.zeros(LONGEST + 1, WIDTH)), "9 vectors; expected 1 to 8"),
    "one vector, seen a million times": (
        saved(torch.zeros(1, WIDTH).expand(1_000_000, WIDTH)),
        "1000000 vectors; expected 1 to 8|something else",
    ),
    "not a number": (saved(torch.full((3, WIDTH), torch.nan)), "not finite"),
    "infinite": (save({"a": torch.full((3, WIDTH), torch.inf)}), "not finite"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_else_is_sent_is_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    raw, said = HOSTILE[name]
    with pytest.raises(ValueError, match=said) as caught:
        read(raw)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out


def test_text_that_is_no_base64_and_text_without_end_are_refused() -> None:
    with pytest.raises(ValueError, match="not base64"):
        decode_vectors("ä%%", width=WIDTH, longest=LONGEST)
    with pytest.raises(ValueError, match="characters are more than 8 vectors of 4 values take"):
        decode_vectors("A" * 1_000_000, width=WIDTH, longest=LONGEST)


def test_every_cut_or_changed_byte_is_read_or_refused() -> None:
    """Nothing else than a ValueError comes out of the door, and no vectors that were not checked."""
    for raw in (saved(torch.ones(2, WIDTH)), save({"a": torch.ones(2, WIDTH)})):
        cut = [raw[:end] for end in range(0, len(raw), 7)]
        changed = [
            raw[:at] + bytes([raw[at] ^ flip]) + raw[at + 1 :] for at in range(0, len(raw), 3) for flip in (1, 0x80)
        ]
        for damaged in (*cut, *changed):
            try:
                found = read(damaged)
            except ValueError:
                continue
            assert found.shape[1] == WIDTH and bool(torch.isfinite(found).all())
