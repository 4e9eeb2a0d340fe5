"""Pictures in prompts: what a message's image part holds, where `<image k>` markers put them, how a processor reads them.

Not a command. `interleave("see <image 1> now", {1: picture})` gives text, image and text parts in that order.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from console import UserError
from hf_model import load_tokenizer, render_chat

MARKER = re.compile(r"<image[ _]?(\d+)>")


class Picture(str):
    """An image as the bytes of its file: small in memory, decoded when it is used, never scaled here. As a string it is the
    digest that identifies it in logs."""

    data: bytes

    def __new__(cls, data: bytes) -> Picture:
        picture = super().__new__(cls, f"sha256:{hashlib.sha256(data).hexdigest()}")
        picture.data = data
        return picture

    def open(self) -> Any:
        """The PIL image in RGB; what is transparent is white, as on a page."""
        from PIL import Image

        with Image.open(io.BytesIO(self.data)) as image:
            image.load()
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                layers = image.convert("RGBA")
                page = Image.new("RGBA", layers.size, "white")
                return Image.alpha_composite(page, layers).convert("RGB")
            return image.convert("RGB")

    def data_uri(self) -> str:
        """The file for a page that holds all it shows; what is neither is recognized by a browser all the same."""
        kind = "png" if self.data.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"

    @classmethod
    def of_image(cls, image: Any) -> Picture:
        """A PIL image without loss, as a PNG."""
        stream = io.BytesIO()
        image.save(stream, format="PNG")
        return cls(stream.getvalue())

    @classmethod
    def of_column(cls, value: Any, where: str, directory: Path | None = None) -> Picture:
        """What a data set's image column holds: {"bytes", "path"} of an undecoded column, a path relative to ``directory``,
        a data URI or base64. ``where`` names the row in the error."""
        if isinstance(value, Mapping):
            if value.get("bytes"):
                return cls(bytes(value["bytes"])).checked(where)
            value = value.get("path")
        if not isinstance(value, str) or not value:
            raise UserError(f"{where}: expected an image: a path, base64 or bytes")
        path = (directory or Path()) / value if len(value) < 1024 else None
        if path is not None and path.is_file():
            return cls(path.read_bytes()).checked(where)
        try:
            data = base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
        except binascii.Error:
            raise UserError(f"{where}: {value[:60]}: no such image file beside the data, and not base64") from None
        return cls(data).checked(where)

    def checked(self, where: str) -> Picture:
        """This picture, or one line that says what is not an image."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(self.data)) as image:
                image.verify()
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise UserError(f"{where}: not an image that Pillow reads ({error})") from None
        return self


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image_part(picture: Picture) -> dict[str, Any]:
    return {"type": "image", "image": picture}


def interleave(text: str, pictures: Mapping[int, Picture]) -> list[dict[str, Any]]:
    """Content parts in the order of the text: each `<image k>` becomes picture k at that place, at each of its mentions.

    Pictures that no marker names stand before the text, in their order. A marker without a picture stays as text: see
    :func:`unmatched`.
    """
    named = [match for match in MARKER.finditer(text) if int(match[1]) in pictures]
    used = {int(match[1]) for match in named}
    parts, end = [image_part(pictures[number]) for number in sorted(pictures) if number not in used], 0
    for match in named:
        if text[end : match.start()]:
            parts.append(text_part(text[end : match.start()]))
        parts.append(image_part(pictures[int(match[1])]))
        end = match.end()
    return [*parts, text_part(text[end:])] if text[end:] else parts


def unmatched(text: str, pictures: Mapping[int, Picture]) -> bool:
    """Whether the text has a marker without a picture, or lacks one for a picture: a fault of the data worth counting."""
    return {int(number) for number in MARKER.findall(text)} != pictures.keys()


class Prompt(str):
    """A rendered prompt with its pictures. As a string it is what identifies it in logs and seeds: the text, then a line
    with the digest of each picture. ``text`` and ``pictures`` are what the engine gets."""

    text: str
    pictures: tuple[Picture, ...]

    def __new__(cls, text: str, pictures: Sequence[Picture]) -> Prompt:
        whole = super().__new__(cls, "\n".join([text, *pictures]))
        whole.text, whole.pictures = text, tuple(pictures)
        return whole


def pictures_of(messages: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The pictures of chat turns, in the order in which the template meets them."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [part["image"] for parts in contents for part in parts if part["type"] == "image"]


def image_only_processor(path: str | Path) -> Any:
    """The processor of a Qwen vision-language checkpoint without its video half, which needs torchvision."""
    from transformers import AutoImageProcessor, Qwen3VLProcessor
    from transformers.processing_utils import ProcessorMixin

    class ImageProcessor(Qwen3VLProcessor):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    tokenizer = load_tokenizer(path)
    images = AutoImageProcessor.from_pretrained(str(path), local_files_only=True, backend="pil")
    return ImageProcessor(images, tokenizer, tokenizer.chat_template)


def load_processor(path: str | Path) -> Any:
    """The checkpoint's own processor; where torchvision is missing (its PyPI wheels break a CPU torch) and the family is
    one of Qwen's, the same with images only, on Pillow. Scaling limits are the checkpoint's."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.utils import is_torchvision_available

    family = AutoConfig.from_pretrained(str(path), local_files_only=True).model_type
    if not is_torchvision_available() and family.startswith(("qwen3_5", "qwen3_vl", "qwen2_vl", "qwen2_5_vl")):
        processor = image_only_processor(path)
    else:
        processor = AutoProcessor.from_pretrained(str(path), local_files_only=True)
    if not getattr(processor, "chat_template", None):
        raise UserError(f"{path}: the processor has no chat template")
    return processor


def render_messages(processor: Any, messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """Chat turns by the processor's template: each image stands as its placeholder, where the turn has it."""
    plain = [
        {**message, "content": message["content"] if isinstance(message["content"], str) else
         [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]}
        for message in messages
    ]  # fmt: skip
    return Prompt(render_chat(processor, plain), pictures_of(messages))


def config_with_eyes(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint, which must be one of a vision-language model."""
    config = Checkpoint(path).config
    if "vision_config" not in config:
        raise UserError(f"{path}: config.json has no vision_config; use vllm_eval8.py for a text model")
    return config
