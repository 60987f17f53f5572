"""Names of served models, and what a name and a ``collaboration`` object mean for the engine."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, UnsetType

from engine.strategies.deferral.policies import POLICIES
from engine.types import BASE, Collaboration, EngineInfo, GateInfo, PolicyName
from server.blends import BlendPreset, BlendTable
from server.errors import ApiError, invalid, shown, unknown_model
from server.protocol.common import CollaborationOptions
from server.protocol.responses import CurvePoint, ServedCollaboration, ServedRegret
from server.shares import threshold_of, threshold_within
from server.strategies import characters, strategy_of


class ModelTable:
    """The joint model under its configured name, and each member alone as NAME/MEMBER.

    Args:
        name: the joint model's name.
        lane_names: "base" and the experts, in the order of lane numbers.
        blends: what requests may ask to be blended; models of a name of their own may have one by default.
    """

    def __init__(self, name: str, lane_names: tuple[str, ...], blends: BlendTable | None = None) -> None:
        self.name = name
        self.lane_names = lane_names
        self._blends = blends or BlendTable({}, lane_names, None)
        self._members = {name: None} | {f"{name}/{lane}": number for number, lane in enumerate(lane_names)}
        self._members |= dict.fromkeys(self._blends.served)
        self._experts = {lane: number for number, lane in enumerate(lane_names) if number != BASE}

    def parent(self, name: str) -> str | None:
        """The joint model, of a member or of a blend under a name of its own."""
        return None if name == self.name else self.name

    @property
    def names(self) -> list[str]:
        """All served names, the joint model first."""
        return list(self._members)

    def member(self, name: str) -> int | None:
        """The lane that a name stands for; None is the joint model.

        Raises:
            ApiError: 404, no such model.
        """
        try:
            return self._members[name]
        except KeyError:
            raise unknown_model(name) from None

    def served(self, info: EngineInfo) -> ServedCollaboration:
        """What is in force for requests that name nothing, and what they may name."""
        gate = info.gate
        policies = [name for name, policy in POLICIES.items() if gate is not None or policy.needs != "gate"]
        spelled = info.vocabularies == "spelled"
        blends = []
        if self._experts and (not spelled or "deferral" in info.strategies):
            blends = self._blends.usable(has_gate=gate is not None, spelled=spelled)
        return ServedCollaboration(
            info.policy,
            policies,
            info.thresholds,
            gate is not None,
            list(self._experts),
            blends,
            list(info.strategies),
            info.vocabularies,
            _curve(gate),
            info.veto or UNSET,
            _regret(info),
        )

    def collaboration(self, name: str, options: CollaborationOptions | None, info: EngineInfo) -> Collaboration:
        """What the engine is told.

        Args:
            name: of the model that is asked for.

        Raises:
            ApiError: 400, naming the field. Prompts of members are not in it yet, see :meth:`prompts`.
        """
        member = self.member(name)
        if member is not None:
            if options is not None:
                for field in options.model_fields_set - {"report"}:
                    if getattr(options, field) is not None:
                        raise invalid(
                            f"'collaboration.{field}' is for the joint model '{self.name}'; "
                            "a member alone takes only 'report'.",
                            f"collaboration.{field}",
                        )
            return Collaboration(member=member, looks=bool(options and options.report))
        options = options or CollaborationOptions()
        if self._experts and self._asks_for_characters(name, options, info):
            return characters(options, self.lane_names)
        preset = self._preset(name, options, info)
        spelled = info.vocabularies == "spelled"
        blend = self._blends.blend(options, preset, has_gate=info.gate is not None, spelled=spelled)
        if options.veto and blend is not None:
            raise invalid(
                "'collaboration.veto' is for an expert's own token; in a blend the members write together.",
                "collaboration.veto",
            )
        policy, threshold = options.policy, options.threshold
        if preset is not None and policy is None:
            policy = preset.usual_policy
            threshold = preset.threshold if threshold is None else threshold
        effective = policy or info.policy
        self._check_gate(effective, options, info)
        self._check_heeded(effective, options)
        threshold = self._measured_threshold(options, info, threshold)
        rate: dict[str, Any] = {} if options.rate is None else {"rate": options.rate}
        return Collaboration(
            policy=policy,
            threshold=threshold,
            **rate,
            max_expert_tokens=options.max_expert_tokens,
            experts=self._lanes_of(options.experts),
            run_ahead=options.run_ahead,
            blend=blend,
            veto=options.veto,
            regret=options.regret,
            looks=bool(options.report),
        )

    def prompts(
        self, name: str, options: CollaborationOptions | None, collaboration: Collaboration, info: EngineInfo
    ) -> dict[int, tuple[str, str]]:
        """By lane: the field and the text of prompts that are not the request's own.

        Args:
            collaboration: of the same request.

        Raises:
            ApiError: 400, naming the field.
        """
        if options is None or collaboration.member is not None:
            options = CollaborationOptions()
        return self._blends.prompts(options, self._preset(name, options, info), collaboration.blend)

    def _preset(self, name: str, options: CollaborationOptions, info: EngineInfo) -> BlendPreset | None:
        return self._blends.preset(
            options,
            self._blends.served.get(name),
            has_gate=info.gate is not None,
            spelled=info.vocabularies == "spelled",
        )

    def _asks_for_characters(self, name: str, options: CollaborationOptions, info: EngineInfo) -> bool:
        if name in self._blends.served and options.strategy is None:
            # Its blend is of deferral's.
            options = options.model_copy(update={"strategy": "deferral"})
        return strategy_of(options, info) == "characters"

    def _check_gate(self, policy: PolicyName, options: CollaborationOptions, info: EngineInfo) -> None:
        if info.gate is not None or not self._experts:
            return
        if POLICIES[policy].needs == "gate":
            free = ", ".join(name for name, other in POLICIES.items() if other.needs != "gate")
            asked = f"The policy '{policy}'" if options.policy else "The default policy"
            raise invalid(
                f"{asked} needs a gate and this pair has none; 'collaboration.policy' may be one of: {free}.",
                "collaboration.policy",
            )

    def _measured_threshold(
        self, options: CollaborationOptions, info: EngineInfo, threshold: float | None
    ) -> float | None:
        """The threshold for a share of tokens or for a cost; ``threshold`` where a request has neither.

        Raises:
            ApiError: 400, there is no curve to find it by, or it is of other experts.
        """
        given = [name for name in ("share", "cost", "threshold") if getattr(options, name) is not None]
        if not {"share", "cost"} & set(given):
            return threshold
        param = f"collaboration.{given[0]}"
        if len(given) > 1:
            raise invalid(f"'{param}' and 'collaboration.{given[1]}' say the same thing; give one of them.", param)
        curve = [] if info.gate is None else info.gate.curve if options.cost is None else info.gate.costs
        if not curve:
            measured = "" if options.cost is None else " that measured what experts cost"
            raise invalid(
                f"'{param}' needs a gate with a stored calibration{measured}, and this pair's has none; give "
                "'collaboration.threshold', or calibrate the gate (collm train recalibrate).",
                param,
            )
        if options.experts is not None and set(options.experts) != set(self._experts):
            raise invalid(f"'{param}' goes by the calibration of all experts together; leave out 'experts'.", param)
        if options.share is not None:
            return threshold_of(options.share, curve)
        return threshold_within(options.cost or 0.0, curve)

    def _check_heeded(self, policy: PolicyName, options: CollaborationOptions) -> None:
        """Refuse what the policy does not look at: the answer would not be the one that was asked for."""
        thresholds: list[str] = [name for name, each in POLICIES.items() if each.has_threshold]
        policies = {"threshold": thresholds, "share": ["threshold"], "cost": ["threshold"], "rate": ["random"]}
        for field, heeding in policies.items():
            if getattr(options, field) is not None and policy not in heeding:
                raise invalid(
                    f"'collaboration.{field}' means nothing to the policy '{policy}', only to {' and '.join(heeding)}.",
                    f"collaboration.{field}",
                    "invalid_value",
                )
        if options.blend is not None and policy == "never":
            raise invalid(
                "'collaboration.blend' means nothing to the policy 'never', which asks no expert.",
                "collaboration.blend",
                "invalid_value",
            )

    def _lanes_of(self, experts: list[str] | None) -> tuple[int, ...] | None:
        if experts is None:
            return None
        param = "collaboration.experts"
        for name in experts:
            if name not in self._experts:
                raise ApiError(400, f"'{param}': there is no expert {shown(name)}.", param=param, code="unknown_expert")
        if len(set(experts)) < len(experts):
            raise invalid(f"'{param}' names an expert twice.", param)
        return tuple(self._experts[name] for name in experts)


def _regret(info: EngineInfo) -> ServedRegret | UnsetType:
    if info.gate is None or info.gate.hindsight is None:
        return UNSET
    return ServedRegret(info.gate.hindsight.ahead, info.gate.hindsight.threshold, info.regret)


def _curve(gate: GateInfo | None) -> list[CurvePoint] | UnsetType:
    if gate is None or not gate.curve:
        return UNSET
    costs = dict(gate.costs)
    return [
        CurvePoint(min(max(threshold, 0.0), 1.0), share, costs.get(threshold, UNSET))
        for threshold, share in sorted(gate.curve)
    ]
