"""Blends by name: the presets that everybody has, those of the configuration, and what a request makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.blends import GREATEST_TOP, GREATEST_WEIGHT, Blend, BlendKind, problem
from engine.spelling.named import Score
from engine.types import BASE, PolicyName
from server.errors import ApiError, invalid, shown
from server.protocol.common import BlendOptions, CollaborationOptions

PARAM = "collaboration.blend"

DEFAULT_PLAUSIBILITY = 0.1
DEFAULT_BETA = 0.5
DEFAULT_GAMMA = 1.5


class BlendPreset(BaseModel):
    """A blend under a name of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Literal["mixture", "product", "union", "proxy", "contrastive", "cfg"]
    """What is written where the experts are asked. "mixture": average of probabilities. "product": weighted sum of
    logits. "union": the average over the most probable tokens of each member. "proxy" and "contrastive": products, see
    ``tuned`` and ``expert``. "cfg": classifier-free guidance, a product of the base and the base under a negative
    prompt; needs ``scheduler.guidance``."""

    weights: dict[str, float] | Literal["gate"] | None = None
    """Weight of each member ("base", or an expert's name), or "gate" for a mixture by the gate's probabilities. None:
    equal weights of all members."""

    anchor: str | None = None
    """Products: the member that says what is plausible."""

    plausibility: float | None = Field(default=None, gt=0, le=1)
    """Products: tokens less probable than this share of the anchor's most probable one are ruled out."""

    top: int | None = Field(default=None, ge=1, le=GREATEST_TOP)
    """Unions: how many of each member's most probable tokens may be written. Default: 10."""

    score: Score | None = None
    """Unions where vocabularies differ: what a member gives to a string that is none of its tokens. "mass": what all
    its tokens have together that begin with it; "first": what it gives to the first token of its spelling, as
    published. Default: "mass"."""

    align: bool | None = None
    """Unions where vocabularies differ: ask experts only where all of them have a token boundary. Default: true."""

    tuned: str | None = None
    """"proxy": the small tuned expert, whose difference to ``untuned`` is added to the base. Default: "tuned"."""

    untuned: str | None = None
    """"proxy": the same small model before it was tuned. Default: "untuned"."""

    expert: str | None = None
    """"contrastive": the member whose faults are to be avoided less than the amateur's. Default: the only expert."""

    amateur: str | None = None
    """"contrastive": the weaker member, whose preferences count against a token. Default: "base"."""

    alpha: float | None = Field(default=None, ge=0, le=10)
    """"proxy": how much of the difference is added; default 1. "contrastive": the plausibility; default 0.1."""

    beta: float | None = Field(default=None, ge=0, le=9)
    """"contrastive": weight of the amateur. Default: 0.5."""

    gamma: float | None = Field(default=None, ge=0, le=GREATEST_WEIGHT)
    """"cfg": how far from the negative prompt; 1 is the base alone. Default: 1.5."""

    negative_prompt: str | None = Field(default=None, min_length=1)
    """"cfg": for requests that have none."""

    policy: PolicyName | None = None
    """Where the experts are asked, for requests that do not say. None: everywhere ("always") for "proxy", "contrastive"
    and "cfg", else the pair's default."""

    threshold: float | None = Field(default=None, ge=0, le=1)
    """Threshold of that policy, for requests that do not say."""

    served_model_name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")
    """Serve the pair under this name too, with this blend as the default, so that clients need no field of ours."""

    @property
    def usual_policy(self) -> PolicyName | None:
        """See ``policy``."""
        return self.policy or ("always" if self.kind in ("proxy", "contrastive", "cfg") else None)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in sorted(self.model_fields_set - {"kind", "policy", "threshold", "served_model_name"}):
            if field not in _FIELDS[self.kind]:
                raise ValueError(f"{field} is not for kind {self.kind!r}")
        return self


_FIELDS: dict[str, tuple[str, ...]] = {
    "mixture": ("weights",),
    "product": ("weights", "anchor", "plausibility"),
    "union": ("weights", "top", "score", "align"),
    "proxy": ("tuned", "untuned", "alpha"),
    "contrastive": ("expert", "amateur", "alpha", "beta"),
    "cfg": ("gamma", "negative_prompt"),
}

BUILT_IN: dict[str, BlendPreset] = {
    "mixture": BlendPreset(kind="mixture"),
    "union": BlendPreset(kind="union"),
    "proxy": BlendPreset(kind="proxy"),
    "contrastive": BlendPreset(kind="contrastive"),
    "cfg": BlendPreset(kind="cfg"),
}
"""What every server knows by name, unless its configuration gives the name another meaning."""

_PARAMETERS: dict[str, tuple[str, ...]] = {
    "proxy": ("alpha",),
    "contrastive": ("alpha", "beta"),
    "cfg": ("gamma", "negative_prompt"),
}
"""What a request may change of a preset, by the preset's kind."""

_CHANGEABLE = ("alpha", "beta", "gamma", "negative_prompt")


class BlendError(ValueError):
    """A blend that these members cannot have. The message is a sentence."""


class BlendTable:
    """All blends of a server.

    Args:
        presets: of the configuration.
        lane_names: "base" and the experts, in the order of lane numbers.
        obstacle: why none can be served, see :attr:`engine.config.EngineConfig.blend_obstacle`.
        guidance: the base has a lane for negative prompts, behind all members.
    """

    def __init__(
        self,
        presets: Mapping[str, BlendPreset],
        lane_names: Sequence[str],
        obstacle: str | None,
        *,
        guidance: bool = False,
    ) -> None:
        self._presets = BUILT_IN | dict(presets)
        self._lanes = {name: number for number, name in enumerate(lane_names)}
        self._obstacle = obstacle
        self._guidance = guidance
        self.served = {preset.served_model_name: name for name, preset in presets.items() if preset.served_model_name}
        """Names of models whose default is a blend, and which."""

    def usable(self, *, has_gate: bool, spelled: bool = False) -> list[str]:
        """Names that a request for this pair may give; none where nothing can be blended.

        Args:
            spelled: members have vocabularies of their own.
        """
        if self._obstacle is not None:
            return []
        kinds = {"union"} if spelled else _FIELDS.keys()
        return [name for name, each in self._presets.items() if each.kind in kinds and self._fits(name, has_gate)]

    def _fits(self, name: str, has_gate: bool) -> bool:
        try:
            self._checked(self._of_preset(self._presets[name]), has_gate=has_gate)
        except BlendError:
            return False
        return True

    def check_presets(self, names: Sequence[str]) -> None:
        """Look at presets before anybody asks for them.

        Raises:
            BlendError: one cannot be served; names it.
        """
        for name in names:
            if self._obstacle is not None:
                raise BlendError(f"blends.{name}: {self._obstacle}")
            try:
                self._checked(self._of_preset(self._presets[name]), has_gate=True)
            except BlendError as error:
                raise BlendError(f"blends.{name}: {error}") from None

    def preset(
        self, options: CollaborationOptions, default: str | None, *, has_gate: bool, spelled: bool
    ) -> BlendPreset | None:
        """The preset that a request names, or that its model has by default.

        Args:
            has_gate, spelled: see :meth:`usable`.

        Raises:
            ApiError: 400, there is none of that name.
        """
        asked = default if options.blend is None else options.blend
        if not isinstance(asked, str):
            return None
        try:
            return self._presets[asked]
        except KeyError:
            known = ", ".join(sorted(self.usable(has_gate=has_gate, spelled=spelled))) or "none for this pair"
            message = f"'{PARAM}': there is no blend {shown(asked)}; there are: {known}."
            raise ApiError(400, message, param=PARAM, code="unknown_blend") from None

    def blend(
        self, options: CollaborationOptions, preset: BlendPreset | None, *, has_gate: bool, spelled: bool = False
    ) -> Blend | None:
        """What the engine is told; None if the request wants the expert's own tokens.

        Args:
            spelled: members have vocabularies of their own.

        Raises:
            ApiError: 400, naming the field.
        """
        kind = preset.kind if preset is not None else None
        for field in _CHANGEABLE:
            if getattr(options, field) is not None and field not in _PARAMETERS.get(kind or "", ()):
                having = " and ".join(f"'{name}'" for name, fields in _PARAMETERS.items() if field in fields)
                raise invalid(f"'collaboration.{field}' is for blends of the kind {having}.", f"collaboration.{field}")
        given = options.blend
        if preset is None and given is None:
            return None
        if self._obstacle is not None:
            raise invalid(f"'{PARAM}' cannot be served here: {self._obstacle}.", PARAM)
        try:
            if preset is not None:
                changed = {field: getattr(options, field) for field in _CHANGEABLE}
                changed = {field: value for field, value in changed.items() if value is not None}
                blend = self._of_preset(preset.model_copy(update=changed), options.experts)
            else:
                assert isinstance(given, BlendOptions)
                blend = self._of_options(given, options.experts)
            self._checked(blend, has_gate=has_gate)
            if spelled and blend.kind != "union":
                raise BlendError(f"a {blend.kind} needs one vocabulary, and the members' differ; a union does not")
            if not spelled and (blend.score is not None or blend.align is not None):
                raise BlendError("score and align are for members of different vocabularies, and these share one")
            if options.experts is not None:
                names = {number: name for name, number in self._lanes.items()}
                for lane in blend.effective().lanes:
                    if BASE < lane < len(names) and names[lane] not in options.experts:
                        raise BlendError(f"{names[lane]} is a member of the blend, but not among the experts")
        except BlendError as error:
            raise invalid(f"'{PARAM}': {error}.", PARAM) from None
        return blend

    def prompts(
        self, options: CollaborationOptions, preset: BlendPreset | None, blend: Blend | None
    ) -> dict[int, tuple[str, str]]:
        """By lane: the field and the text of prompts that are not the request's own.

        Raises:
            ApiError: 400, naming the field.
        """
        found: dict[int, tuple[str, str]] = {}
        for name, text in (options.prompts or {}).items():
            if self._lanes.get(name, BASE) == BASE:
                raise invalid(
                    f"'collaboration.prompts' names {shown(name)}, which is no expert.", "collaboration.prompts"
                )
            found[self._lanes[name]] = (f"collaboration.prompts.{name}", text)
        negative = len(self._lanes)
        if blend is not None and negative in blend.effective().lanes:
            own = preset.negative_prompt if preset is not None else None
            given = own if options.negative_prompt is None else options.negative_prompt
            param = "collaboration.negative_prompt"
            if given is None:
                raise invalid(f"'{param}' is required by the blend 'cfg'.", param, "missing_field")
            found[negative] = (param, given)
        return found

    def _checked(self, blend: Blend, *, has_gate: bool) -> None:
        if (reason := problem(blend, len(self._lanes) + self._guidance, has_gate=has_gate)) is not None:
            raise BlendError(reason)

    def _of_options(self, options: BlendOptions, experts: Sequence[str] | None) -> Blend:
        for field in ("anchor", "plausibility", "top", "score", "align"):
            if getattr(options, field) is not None and field not in _FIELDS[options.kind]:
                raise BlendError(f"{field} is not for a {options.kind}")
        return self._combination(
            options.kind, options.weights, options.anchor, options.plausibility, experts, **_of_union(options)
        )

    def _of_preset(self, preset: BlendPreset, experts: Sequence[str] | None = None) -> Blend:
        if preset.kind == "proxy":
            alpha = 1.0 if preset.alpha is None else preset.alpha
            tuned = self._role(preset.tuned, "tuned", preset.tuned or "tuned")
            untuned = self._role(preset.untuned, "untuned", preset.untuned or "untuned")
            return self._combination("product", {"base": 1.0, tuned: alpha, untuned: -alpha})
        if preset.kind == "cfg":
            if not self._guidance:
                raise BlendError("guidance is not served here: set scheduler.guidance")
            gamma = DEFAULT_GAMMA if preset.gamma is None else preset.gamma
            return Blend("product", ((BASE, gamma), (len(self._lanes), 1.0 - gamma)))
        if preset.kind == "contrastive":
            beta = DEFAULT_BETA if preset.beta is None else preset.beta
            plausibility = DEFAULT_PLAUSIBILITY if preset.alpha is None else preset.alpha
            among = [name for name in self._lanes if name != "base" and (experts is None or name in experts)]
            expert = self._role(preset.expert, "expert", among[0] if len(among) == 1 else None)
            amateur = self._role(preset.amateur, "amateur", preset.amateur or "base")
            if amateur == expert:
                raise BlendError(f"{expert} cannot be the expert and the amateur")
            weights = {amateur: -beta, expert: 1.0 + beta}
            # 0 rules nothing out.
            return self._combination("product", weights, expert if plausibility else None, plausibility or None)
        return self._combination(
            preset.kind, preset.weights, preset.anchor, preset.plausibility, experts, **_of_union(preset)
        )

    def _role(self, named: str | None, role: str, usual: str | None) -> str:
        name = named or usual
        if name is None or name not in self._lanes:
            which = "several experts could be it" if name is None else f"there is no member {shown(name)}"
            narrowed = ", or have one of 'collaboration.experts'" if role == "expert" and name is None else ""
            raise BlendError(
                f"which member is '{role}' is not clear ({which}): name it in the configuration, [blends.X]{narrowed}"
            )
        return name

    def _combination(
        self,
        kind: BlendKind,
        weights: Mapping[str, float] | Literal["gate"] | None,
        anchor: str | None = None,
        plausibility: float | None = None,
        experts: Sequence[str] | None = None,
        **of_union: Any,
    ) -> Blend:
        if kind == "product" and not isinstance(weights, Mapping):
            raise BlendError("a product needs weights")
        if isinstance(weights, Mapping):
            named = dict(weights)
        else:
            members = [name for name in self._lanes if name == "base" or experts is None or name in experts]
            named = dict.fromkeys(members, 1.0 / len(members))
        for name in (*named, *([anchor] if anchor is not None else [])):
            if name not in self._lanes:
                raise BlendError(f"there is no member {shown(name)}; there are: {', '.join(self._lanes)}")
        if plausibility is not None and anchor is None:
            raise BlendError("plausibility needs an anchor: the member that says what is plausible")
        if anchor is not None and plausibility is None:
            raise BlendError("an anchor needs plausibility")
        numbered = sorted((self._lanes[name], float(weight)) for name, weight in named.items())
        return Blend(
            kind,
            tuple(numbered),
            from_gate=weights == "gate",
            anchor=self._lanes[anchor] if anchor is not None else BASE,
            plausibility=plausibility or 0.0,
            **of_union,
        )


def _of_union(options: BlendOptions | BlendPreset) -> dict[str, Any]:
    """What is given of a union's own fields."""
    given = {"top": options.top, "score": options.score, "align": options.align}
    return {field: value for field, value in given.items() if value is not None}
