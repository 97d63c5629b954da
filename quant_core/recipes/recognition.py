"""Recognition of models: what is refused, and the warnings of a plan.

A model that no preset recognizes is refused by ``lrq`` and the nodes, and so are kinds of files that ComfyUI does not load
quantized (:mod:`.refused`), unless ``--general`` or the node's switch allows it. That is an argument of the run, ``general``,
as ``overwrite`` is, and not part of the recipe: recipes and fingerprints do not depend on it. By default the library, whose
callers know their tensors, refuses such kinds of files only.
"""

import re
from collections.abc import Sequence

from ..display import shorten
from ..errors import NothingToQuantizeError, RecipeError, UnrecognizedModelError
from ..sources import Source
from .layers import LayerRule
from .presets import AUTO, NONE, START, Mark, Preset, find_preset, matching_presets, recognize_preset
from .refused import GENERAL_SWITCH, find_refusal

__all__ = [
    "check_kind",
    "check_recognized",
    "choose_preset",
    "describe_configuration",
    "describe_expert",
    "describe_unused",
]

_SHOWN = 5  # rules in a warning
_SHOWN_CHARACTERS = 100  # of a rule or a name

_WAN_14B = Mark.parse("blocks.0.self_attn.q.weight 5120x5120")
# WAN models of that size that are complete by themselves have one of these.
_WAN_COMPLETE = re.compile(
    START + r"(img_emb|vace_\w+|audio_\w+|casual_audio_encoder|motion_encoder|face_\w+|music_\w+|pose_\w+)\."
)
_OLDER = re.compile(r"wan[-_. ]?v?2[-_. ]?1", re.IGNORECASE)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_EXPERT_WORD = re.compile(r"(high|low)(?:noise)?")
_EXPERT_FOLDER = re.compile(r"(high|low)[-_. ]?noise", re.IGNORECASE)
_TITLES = ("modelspec.title", "general.name")  # keys of the header
_OTHER = {"high": "low", "low": "high"}
# Preset → what ComfyUI reads from the header's entry "config" and does not detect in the tensors; end of a sentence.
_CONFIGURED = {
    "ltxv": "the positions of frames of LTX-Video 0.9.5 and newer; use a file that has it, unless this is an older version",
    "ltxv2": "the configuration of LTX-2; use a file that has it",
}


def choose_preset(choice: str | Preset, source: Source) -> Preset | None:
    """The preset of a recipe's ``preset``, or a preset itself; None for the general rule alone.

    Raises:
        RecipeError: the preset covers no layer of the source, and another one recognizes it.
    """
    if isinstance(choice, Preset):
        return choice
    if choice in (AUTO, NONE):
        return recognize_preset(source.tensors) if choice == AUTO else None
    preset = find_preset(choice)
    if not preset.covers_any(source.tensors) and (other := recognize_preset(source.tensors)):
        raise RecipeError(
            f"Preset {choice} matches no layer of {source.name}; its layers are those of {other.title}: use preset {other.name}.",
            option="preset",
        )
    return preset


def check_kind(source: Source, general: bool | None) -> None:
    """Raise :class:`NothingToQuantizeError` for a kind of file that ComfyUI does not load quantized, unless ``general`` is True."""
    if reason := find_refusal(source.tensors, general=general is True):
        raise NothingToQuantizeError(f"{source.name} is {reason}.")


def check_recognized(source: Source, choice: str | Preset, preset: Preset | None, layers: Sequence[str]) -> None:
    """Refuse to apply the general rule to a model that nobody asked to apply it to.

    Args:
        choice: of the recipe; "none" asks for the general rule.
        preset: the chosen preset.
        layers: the layers to quantize.

    Raises:
        UnrecognizedModelError: no preset recognizes the source, several do, or the named one covers none of its layers.
    """
    if choice == NONE or (preset and preset.covers_any(source.tensors)):
        return
    several = [found.name for found in matching_presets(source.tensors)]
    what = f"Presets {', '.join(several)} all match" if several else "No preset recognizes"
    raise UnrecognizedModelError(
        f"{what} the layers of {source.name}, such as {shorten(layers[0], _SHOWN_CHARACTERS)}; "
        f"name the preset of its family, or apply the general rule with {GENERAL_SWITCH}.",
        file=source.name,
    )


def describe_unused(
    source: Source, choice: str | Preset, preset: Preset | None, idle: Sequence[LayerRule]
) -> str | None:
    """A warning about the choices of the user that match no layer; None if all do.

    Args:
        choice, preset: as for :func:`check_recognized`.
        idle: layer rules that match no layer.
    """
    reasons = [rule.reason for rule in idle]
    if isinstance(choice, str) and preset and not preset.covers_any(source.tensors):
        reasons.insert(0, f"preset {choice}")
    if not reasons:
        return None
    shown = [shorten(text, _SHOWN_CHARACTERS) for text in reasons[:_SHOWN]]
    more = f" and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return f"No quantizable layer of {source.name} matches {', '.join(shown)}{more}; check the spelling, or leave out what has no effect."


def describe_configuration(source: Source, preset: Preset | None) -> str | None:
    """A note that a file lacks the part of its configuration that ComfyUI reads from the header; None for any other source.

    Files of diffusers have it in another file, and conversions to GGUF often leave it out.
    """
    if preset is None or preset.name not in _CONFIGURED or not preset.covers_any(source.tensors):
        return None
    if "config" in source.metadata or not getattr(source, "paths", ()):
        return None
    return f"{source.name} has no entry 'config' in its header, from which ComfyUI takes {_CONFIGURED[preset.name]}."


def describe_expert(source: Source, preset: Preset | None) -> str | None:
    """A note that WAN 2.2 14B is two models, one for high and one for low noise; None for any other model.

    The two differ in their weights only, so the name of the file or folder tells which one it is. Without such a name the note
    is conditional, unless the tensors or the name are those of a model that is complete by itself.
    """
    if preset is None or preset.name != "wan" or not _WAN_14B.matches(source.tensors):
        return None
    header = {**getattr(source, "values", {}), **source.metadata}  # the values of a GGUF file
    texts = (source.name, *(title for key in _TITLES if isinstance(title := header.get(key), str)))
    newer = [text for text in texts if not _OLDER.search(text)]  # "low" in the name of a WAN 2.1 is not about noise
    folder = next((path.parent.name for path in getattr(source, "paths", ())), "")
    if noise := _find_noise(*newer, folder=folder):
        return (
            f"{source.name} is the {noise}-noise model of WAN 2.2, which works together with the {_OTHER[noise]}-noise model; "
            "quantize that one too."
        )
    if len(newer) < len(texts) or any(map(_WAN_COMPLETE.search, source.tensors)):
        return None
    return f"WAN 2.2 14B is two models, one for high and one for low noise; if {source.name} is one of them, quantize the other one too."


def _find_noise(*texts: str, folder: str) -> str | None:
    """ "high" or "low", where one of the texts or the folder has that word and not the other one as well."""
    words = (word.lower() for text in texts for word in _WORD.findall(text))
    found = {match[1] for word in words if (match := _EXPERT_WORD.fullmatch(word))}
    found |= {match.lower() for match in _EXPERT_FOLDER.findall(folder)}
    return found.pop() if len(found) == 1 else None
