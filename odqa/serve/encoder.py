"""Texts and chats as tokens, for one model.

Text is data. The text of a control token (`</s>`, `<|user|>`) in a prompt or message is text, not the token, so that
nobody ends a prompt or speaks in another role by writing so; where a vocabulary has no other way to write it, it is
left out. Who needs control tokens sends token ids.
"""

import re
import threading
from collections.abc import Callable, Sequence

from odqa.frozen.backbone import Backbone
from odqa.serve.errors import bad
from odqa.serve.schema import EmbedsPart, Message

_HOLDER = "\ue000{}\ue001"  # of a content, while the template is filled: private characters that no template knows
_HOLDERS = re.compile("\ue000(\\d+)\ue001")


class Encoder:
    """Turns texts and chats into tokens, for one model."""

    def __init__(self, name: str, backbone: Backbone, chat_template: str | None = None) -> None:
        self.name, self._tokenizer = name, backbone.tokenizer
        self._lock = threading.Lock()  # a tokenizer's settings are changed by its calls, even if to what they are
        self._template = chat_template or self._tokenizer.chat_template
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        names = {str(token) for token in [*self._tokenizer.all_special_tokens, *added]}
        self._control = re.compile(
            "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)"
        )
        self._reserved = frozenset(self._tokenizer.all_special_ids)
        self._ends = self._special_tokens(goes_on=backbone.architecture == "causal")
        self.vocabulary = int(backbone.model.get_input_embeddings().weight.shape[0])

    def text(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; with `special` those that the tokenizer puts around a text that goes on."""
        with self._lock:
            encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids = list(encoded["input_ids"])
        ids = [token for token in ids if token not in self._reserved] if self._control.search(text) else ids
        return [*self._ends[0], *ids, *self._ends[1]] if special else ids

    def chat(self, messages: Sequence[Message]) -> list[list[int] | str]:
        """A conversation as the template renders it, ready for the assistant's words: token ids, and between them the
        base64 of vectors that stand in the place of words. Raises ApiError (400) without a template, or if it refuses.
        """
        contents: list[tuple[str, bool]] = []  # text, or base64 if True

        def holder(text: str, is_vectors: bool) -> str:
            if not is_vectors and not self._control.search(text) and not _HOLDERS.search(text):
                return text
            contents.append((text, is_vectors))
            return _HOLDER.format(len(contents) - 1)

        turns = [{"role": message.role, "content": "".join(parts_of(message, holder))} for message in messages]
        rendered = self._render(turns)
        pieces: list[list[int] | str] = []
        for place, piece in enumerate(_HOLDERS.split(rendered)):
            if place % 2 == 0:
                with self._lock:
                    encoded = self._tokenizer(piece, add_special_tokens=False, verbose=False)
                pieces.append(list(encoded["input_ids"]))
            else:
                text, is_vectors = contents[int(piece)]
                pieces.append(text if is_vectors else self.text(text, special=False))
        return pieces

    def _render(self, turns: list[dict[str, str]]) -> str:
        if not self._template:
            raise bad(
                f"{self.name} has no chat template. Use /v1/completions, or let the server be started with "
                "--chat-template FILE.",
                "messages",
                code="no_chat_template",
            )
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, chat_template=self._template, tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError as error:
            said = " ".join(str(error).split())[:200]
            raise bad(f"The model's chat template does not take these messages ({said}).", "messages") from None

    def _special_tokens(self, *, goes_on: bool) -> tuple[list[int], list[int]]:
        """What stands around a text; nothing behind a causal model's, which is to go on."""
        bare = list(self._tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(self._tokenizer("a")["input_ids"])
        start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
        return whole[:start], [] if goes_on else whole[start + len(bare) :]


def parts_of(message: Message, holder: Callable[[str, bool], str]) -> list[str]:
    """What `holder` makes of each part of a message's content: of its text, or (True) of the base64 of vectors."""
    if isinstance(message.content, str):
        return [holder(message.content, False)]
    return [
        holder(part.prompt_embeds, True) if isinstance(part, EmbedsPart) else holder(part.text, False)
        for part in message.content
    ]
