"""Lanes: an engine as the scheduler drives it. :mod:`engine.lanes.interface` says what a lane must do."""

from engine.lanes.interface import Extension, Failure, Lane, LaneReport, LaneRequest, LaneWork, Refusal, Sample

__all__ = ["Extension", "Failure", "Lane", "LaneReport", "LaneRequest", "LaneWork", "Refusal", "Sample"]
