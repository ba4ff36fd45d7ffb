"""What of a planned stage will fail, or mean other than it seems, said before anything has run.

Only what words and finished runs tell for certain is said: a search for dropped layers in a space
without `noop`, a stage that speaks in chats with a model whose tokenizer cannot, a comparison that
took chats for its text. What nothing tells yet, the stage itself says when its turn comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tessera.data.config import BPE, DataConfig
from tessera.data.template import TemplateError, template_of
from tessera.data.tokenizer import Tokenizer, TokenizerError, byte_tokenizer, load_tokenizer
from tessera.eval.evaluate import PERPLEXITY, EvalConfig
from tessera.model.config import KINDS
from tessera.objectives.kd import KDConfig, raced
from tessera.objectives.lm import SFTConfig
from tessera.puzzle.bld import BLDConfig
from tessera.puzzle.compare import CompareConfig
from tessera.puzzle.search import SearchConfig
from tessera.puzzle.space import read_space
from tessera.rl.policy import PolicyConfig
from tessera.rl.preference import RPOConfig
from tessera.rl.profile import ProfileConfig
from tessera.runs.files import RunError
from tessera.runs.plan import Step
from tessera.runs.run import is_done

REMOVED = {"dropped": ("attention", "ffn"), "dropped-attention": ("attention",)}
Words = dict[str, set[str]]  # by kind, of all layers together


def doubts(step: Step, steps: Sequence[Step]) -> list[str]:
    """Sentences on one of the steps, none where there is nothing to say or it is done."""
    if step.action == "skip":
        return []
    match step.config:
        case SearchConfig(method=method) if method in REMOVED:
            found = _dropped(step, steps, REMOVED[method])
        case CompareConfig():
            found = _chats_compared(step, steps)
        case _:
            found = _speechless(step, steps)
    return [found] if found else []


def rate_told(step: Step) -> str:
    """Where a distillation takes its learning rate from, where that is not its own table."""
    config = step.config
    if not isinstance(config, KDConfig) or config.lr_from is None:
        return ""
    model = step.inputs["model"]
    assert isinstance(model, Path)
    try:
        lr = f"lr {raced(config, model).train.lr:g}" if is_done(model) else "lr"
    except RunError as error:
        return str(error)
    return f"{lr}, from {config.lr_from}; train.lr = {config.train.lr:g} is not used"


def _origin(path: object, steps: Sequence[Step]) -> Step | None:
    return next((one for one in steps if one.path == path), None)


def _dropped(step: Step, steps: Sequence[Step], kinds: Sequence[str]) -> str:
    scores = step.inputs.get("scores")
    words = _words(scores, steps) if isinstance(scores, Path) else None
    missing = [kind for kind in kinds if words is not None and "noop" not in words[kind]]
    if not missing:
        return ""
    return (
        f'method = "{step.resolved["method"]}" takes layers away, and the space offers no noop for '
        f"the {' nor for the '.join(missing)}: add it to space.{missing[-1]} of the [bld] table"
    )


def _words(path: Path, steps: Sequence[Step]) -> Words | None:
    """The words that a library offers, or that of scores; a planned one's by its own lists."""
    if is_done(path):
        layers = read_space(path).layers
        return {kind: {w for words in layers for w in words[i]} for i, kind in enumerate(KINDS)}
    step = _origin(path, steps)
    if step is None:
        return None
    if isinstance(step.config, BLDConfig):
        space = step.config.space
        lists = [space, *space.layers.values()]
        return {k: {w for one in lists for w in getattr(one, k) or ()} for k in KINDS}
    libraries = step.inputs.get("libraries") or step.inputs.get("library")
    found = [
        _words(one, steps)
        for one in (libraries if isinstance(libraries, list) else [libraries])
        if one is not None
    ]
    known = [one for one in found if one is not None]
    if not known or len(known) < len(found):
        return None
    return {kind: set().union(*(one[kind] for one in known)) for kind in KINDS}


def _chats_compared(step: Step, steps: Sequence[Step]) -> str:
    """Of a comparison whose table names no data, and to which the nearest are chats."""
    above = [one for one in steps if isinstance(one.config, DataConfig)]
    nearest = next((one for one in above if one.path == step.inputs.get("data")), None)
    if "data" in step.spec.table or nearest is None or not _holds_chats(nearest):
        return ""
    texts = [one.name for one in above[: above.index(nearest)] if not _holds_chats(one)]
    other = f'; say {step.name}.data = "{texts[-1]}" to compare on text' if texts else ""
    return (
        f"loss, KL and agreement are measured on [{nearest.name}], which holds chats, because it "
        f"is the nearest data above{other}"
    )


def _holds_chats(step: Step) -> bool:
    assert isinstance(step.config, DataConfig)
    return any(one.chats for one in step.config.readings.values())


def _speechless(step: Step, steps: Sequence[Step]) -> str:
    """Of a stage that renders chats, with a tokenizer that is known to have no template."""
    if not _renders_chats(step):
        return ""
    reason = _no_template(step, steps)
    return f"it speaks in chats, and {reason}" if reason else ""


def _renders_chats(step: Step) -> bool:
    match step.config:
        case DataConfig():
            return _holds_chats(step)
        case EvalConfig(asking="chat", endpoint=None, tasks=tasks):
            return set(tasks) != {PERPLEXITY}
        case RPOConfig() | PolicyConfig() | SFTConfig() | ProfileConfig():
            return True
        case _:
            return False


def _no_template(step: Step, steps: Sequence[Step]) -> str:
    """Why the tokenizer of a step's model has no chat template; "" where it has, or nobody knows.

    A model keeps the tokenizer of what it is made from, down to a checkpoint or to data.
    """
    if isinstance(step.config, DataConfig) and step.config.tokenizer is not None:
        return _of_settings(step.config.tokenizer)
    if step.stage.name == "parent" and "path" in step.spec.table:
        source = step.files["path"]
    else:
        needs = ("model", "parent", "data")
        source = next((step.inputs[need] for need in needs if step.inputs.get(need)), None)
    if not isinstance(source, Path):
        return ""
    origin = _origin(source, steps)
    if origin is not None and not is_done(source):
        return _no_template(origin, steps)
    return _of_files(source)


def _of_settings(tokenizer: str | BPE) -> str:
    if isinstance(tokenizer, BPE):
        lacks = not (tokenizer.chat or tokenizer.tokens)
        return "its tokenizer is trained without chat = true, so it has no marks" if lacks else ""
    if tokenizer == "byte":
        return _reason(byte_tokenizer())
    return _of_files(Path(tokenizer))


def _of_files(path: Path) -> str:
    try:
        return _reason(load_tokenizer(path))
    except TokenizerError:
        return ""


def _reason(tokenizer: Tokenizer) -> str:
    try:
        template_of(tokenizer)
    except TemplateError as error:
        return str(error)
    return ""
