"""Methods from and to the model hub, in its manner: `from_pretrained` takes a folder or a repository's name.

A repository holds the files of `Method.save`, and PEFT's beside them where PEFT computes the same and was asked for.
Of a repository only these files are fetched; nothing in it is run.
"""

import json
import tempfile
from pathlib import Path
from typing import cast

from odqa.errors import ArtifactError, DataError
from odqa.frozen import method as saved
from odqa.frozen import peft_format as peft
from odqa.frozen.backbone import Backbone
from odqa.frozen.method import Method, load_method
from odqa.frozen.peft_format import load_peft, save_peft

FILES = (saved.DESCRIPTION, saved.TENSORS, peft.CONFIG, peft.TENSORS)


def load_pretrained(
    name: str, backbone: Backbone, *, revision: str | None = None, token: str | bool | None = None
) -> Method:
    """Read a method from a folder, or from a repository of the hub (`revision`: a branch, tag or commit).

    Our files go before PEFT's. Raises DataError for a name that neither is a folder nor can be fetched, ArtifactError
    for a place without a method, and what `load_method` and `load_peft` raise.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _fetch(name, revision, token)
    if (folder / saved.DESCRIPTION).is_file():
        return load_method(folder, backbone)
    if (folder / peft.CONFIG).is_file():
        return load_peft(folder, backbone)
    raise ArtifactError(f"{name}: no method here ({saved.DESCRIPTION} or PEFT's {peft.CONFIG} is expected).")


def push_to_hub(
    method: Method,
    repo_id: str,
    backbone: Backbone,
    *,
    with_peft: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Make the repository if there is none, and upload the method with a card in one commit; returns its address.

    `with_peft` adds PEFT's files, or raises ArtifactError where PEFT has no such method. Raises DataError for what the
    hub refuses, a missing token too.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if with_peft:
            save_peft(method, backbone, folder)
        method.save(folder)
        (folder / "README.md").write_text(card(method, backbone), encoding="utf-8")
        api = HfApi(token=token)
        try:
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=made.repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=message or f"Upload {method.kind} with odqa",
            )
        except _refusals() as error:
            raise DataError(f"{repo_id}: the hub does not take it ({str(error).splitlines()[0]}).") from error
    return str(commit.commit_url)


def card(method: Method, backbone: Backbone) -> str:
    """What the repository says of itself: kind, settings, size, and the frozen model with its fingerprint."""
    count = method.count(backbone)
    is_public = "/" in backbone.name and not Path(backbone.name).exists()
    base = [f"base_model: {backbone.name}"] if is_public else []
    return "\n".join(
        [
            *("---", "library_name: odqa", *base, "tags:", "- odqa", f"- {method.kind}", "---", ""),
            f"# {method.kind} for a frozen {Path(backbone.name).name}",
            "",
            f"{count.trainable:,} trained values beside {count.frozen:,} frozen ones; {count.stored_bytes:,} bytes.",
            f"Backbone fingerprint: `{method.backbone_fingerprint}`.",
            f"Settings: `{json.dumps(method.saved_settings(), sort_keys=True)}`.",
            "",
            "```python",
            "from odqa.frozen.backbone import load_backbone",
            "from odqa.frozen.method import Method",
            "",
            f'backbone = load_backbone("{backbone.name if is_public else "MODEL"}", "{backbone.architecture}")',
            'Method.from_pretrained("THIS_REPOSITORY", backbone).attach(backbone)',
            "```",
            "",
        ]
    )


def _fetch(name: str, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=list(FILES)))
    except _refusals() as error:
        raise DataError(
            f"method {name!r}: no such folder here, and the hub does not give it ({str(error).splitlines()[0]})."
        ) from error


def _refusals() -> tuple[type[Exception], ...]:
    """Errors of the hub's client; the bases of its own one are those of the HTTP library, which differs by version."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return cast(tuple[type[Exception], ...], (OSError, HFValidationError, *HfHubHTTPError.__bases__))
