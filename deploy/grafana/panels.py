"""The panels of the dashboard "Deferral", row by row.

A panel's id stays its own for ever: links refer to it. A new panel takes the next free number, whatever its place; the
number of a removed one is not given out again.
"""

from __future__ import annotations

from typing import Any

from parts import ANY, HERE, JOINT, TOKENS, Panel, Query, Row, deferral, distribution, outcomes, quantiles, rate, ratio

SHARE = {"min": 0, "max": 1}
STACKED = {"custom": {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40, "lineWidth": 0}}
UP_OR_DOWN = {
    "mappings": [
        {
            "type": "value",
            "options": {
                "0": {"text": "down", "color": "red", "index": 0},
                "1": {"text": "up", "color": "green", "index": 1},
            },
        }
    ],
    "thresholds": {
        "mode": "absolute",
        "steps": [{"color": "red", "value": None}, {"color": "green", "value": 1}],
    },
}
NEAR_FULL = {
    **SHARE,
    "thresholds": {
        "mode": "absolute",
        "steps": [{"color": "green", "value": None}, {"color": "red", "value": 0.9}],
    },
}

NONE_IS_GOOD = {
    "decimals": 0,
    "thresholds": {
        "mode": "absolute",
        "steps": [{"color": "green", "value": None}, {"color": "red", "value": 0.5}],
    },
}


def line_of(name: str, color: str) -> dict[str, Any]:
    """Draws the query of that legend as a dashed line of its own."""
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [
            {"id": "color", "value": {"mode": "fixed", "fixedColor": color}},
            {"id": "custom.fillOpacity", "value": 0},
            {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [10, 10]}},
        ],
    }


ROWS = [
    Row(
        100,
        "Now",
        [
            Panel(
                1,
                "stat",
                "Deferral rate now",
                "Share of the tokens that experts write: collm_tokens_total with a source other than base / all. "
                "No value without traffic. Members served alone don't count.",
                "percentunit",
                [Query(deferral("model_name"), "{{model_name}}")],
                (5, 4),
                custom=SHARE,
            ),
            Panel(
                2,
                "stat",
                "Tokens a second",
                "Written tokens, members served alone included: collm_tokens_total.",
                TOKENS,
                [Query(rate("collm_tokens_total", ANY, "job"), "{{job}}")],
                (5, 4),
            ),
            Panel(
                3,
                "stat",
                "Requests running",
                "Generation requests in the lanes: collm_requests_running.",
                "short",
                [Query(f"sum by (model_name) (collm_requests_running{{{JOINT}}})", "{{model_name}}")],
                (4, 4),
            ),
            Panel(
                4,
                "stat",
                "Requests waiting",
                "Generation requests that are not in the lanes yet: collm_requests_waiting.",
                "short",
                [Query(f"sum by (model_name) (collm_requests_waiting{{{JOINT}}})", "{{model_name}}")],
                (4, 4),
            ),
            Panel(
                5,
                "stat",
                "Lanes up",
                "Whether every server can run the lane: collm_lane_up, its smallest value.",
                "none",
                [Query(f"min by (model_name, lane) (collm_lane_up{{{JOINT}}})", "{{lane}}")],
                (6, 4),
                options={"colorMode": "background", "graphMode": "none"},
                custom=UP_OR_DOWN,
            ),
        ],
    ),
    Row(
        101,
        "Deferral",
        [
            Panel(
                6,
                "timeseries",
                "Deferral rate by model",
                "Share of the tokens that experts write: collm_tokens_total with a source other than base / all.",
                "percentunit",
                [Query(deferral("model_name"), "{{model_name}}")],
                custom=SHARE,
            ),
            Panel(
                7,
                "timeseries",
                "Deferral rate by instance",
                "As before, for each server: collm_tokens_total. Servers behind one router should agree.",
                "percentunit",
                [Query(deferral("model_name", "instance"), "{{model_name}} {{instance}}")],
                custom=SHARE,
            ),
            Panel(
                8,
                "timeseries",
                "Tokens by source",
                "Share of the tokens that each model of the pair writes: collm_tokens_total.",
                "percentunit",
                [
                    Query(
                        ratio(
                            rate("collm_tokens_total", JOINT, "model_name", "source"),
                            rate("collm_tokens_total", JOINT, "model_name"),
                            " on (model_name) group_left ()",
                        ),
                        "{{model_name}} {{source}}",
                    )
                ],
                custom={**SHARE, **STACKED},
            ),
            Panel(
                9,
                "heatmap",
                "Gate probabilities (threshold ${threshold})",
                "How often the gate gave which deferral probability: collm_deferral_probability. A position above the "
                "threshold is deferred by the policy 'threshold'. The threshold is the gate's default as in "
                "collm_build_info, of the first selected server; requests may bring their own.",
                "percentunit",
                [
                    Query(
                        f"sum by (le) (increase(collm_deferral_probability_bucket{{{JOINT}}}[$__rate_interval]))",
                        "{{le}}",
                        shape="heatmap",
                    )
                ],
                (12, 9),
            ),
            Panel(
                10,
                "timeseries",
                "Gate probabilities against the threshold",
                "Quantiles of collm_deferral_probability, and the threshold of collm_build_info (0 where there is no "
                "gate). If the p95 falls below the threshold, hardly anything is deferred.",
                "percentunit",
                [
                    *quantiles("collm_deferral_probability", JOINT),
                    # The zero keeps the query valid where there is no threshold: vector(0), vector(00.5).
                    Query("vector(0$threshold)", "threshold"),
                ],
                (12, 9),
                custom=SHARE,
                overrides=[line_of("threshold", "red")],
            ),
            Panel(
                11,
                "bargauge",
                "Deferral rate of requests",
                "How many requests of the time range had which share of expert tokens, by upper bound: "
                "collm_request_deferral_rate.",
                "short",
                distribution("collm_request_deferral_rate"),
                (12, 8),
            ),
            Panel(
                12,
                "bargauge",
                "Length of expert spans",
                "How many runs of expert tokens of the time range were how long, by upper bound in tokens: "
                "collm_deferral_run_length.",
                "short",
                distribution("collm_deferral_run_length"),
                (12, 8),
            ),
        ],
    ),
    Row(
        102,
        "Base and experts side by side",
        [
            Panel(
                13,
                "timeseries",
                "Tokens a second by source",
                "Tokens that each model writes, members served alone included: collm_tokens_total.",
                TOKENS,
                [Query(rate("collm_tokens_total", ANY, "source"), "{{source}}")],
            ),
            Panel(
                14,
                "timeseries",
                "Step time",
                "Duration of a lane's steps: collm_lane_step_seconds.",
                "s",
                quantiles("collm_lane_step_seconds", JOINT, "lane"),
            ),
            Panel(
                15,
                "timeseries",
                "Time in steps",
                "Share of the time that a lane is computing, averaged over the servers: the rate of "
                "collm_lane_step_seconds_sum. In lockstep the lanes together stay below 100 %; what is missing there "
                "under full load is coordination.",
                "percentunit",
                [
                    Query(
                        f"avg by (lane) (rate(collm_lane_step_seconds_sum{{{JOINT}}}[$__rate_interval]))",
                        "{{lane}}",
                    )
                ],
                custom=SHARE,
            ),
            Panel(
                16,
                "timeseries",
                "Batch rows",
                "Rows in a lane's last step: collm_lane_batch_rows. An expert step costs nearly the same for one row "
                "as for many.",
                "short",
                [Query(f"avg by (lane) (collm_lane_batch_rows{{{JOINT}}})", "{{lane}}")],
            ),
            Panel(
                17,
                "timeseries",
                "KV cache in use",
                "Used share of a lane's KV blocks, on the fullest server: collm_lane_kv_cache_usage_ratio. A parked "
                "request keeps its blocks in both lanes.",
                "percentunit",
                [Query(f"max by (lane) (collm_lane_kv_cache_usage_ratio{{{JOINT}}})", "{{lane}}")],
                custom=NEAR_FULL,
            ),
            Panel(
                18,
                "timeseries",
                "Preemptions",
                "Requests whose KV blocks were dropped for others, to be computed again: collm_lane_preemptions_total.",
                "ops",
                [Query(rate("collm_lane_preemptions_total", JOINT, "lane"), "{{lane}}")],
            ),
            Panel(
                19,
                "timeseries",
                "Catch-up tokens",
                "Written tokens that a lane computed only to catch up with what the other one wrote: "
                "collm_lane_catchup_tokens_total.",
                TOKENS,
                [Query(rate("collm_lane_catchup_tokens_total", JOINT, "lane"), "{{lane}}")],
            ),
            Panel(
                20,
                "timeseries",
                "Waiting for the expert",
                "From parking a request to the expert's token: collm_expert_wait_seconds.",
                "s",
                quantiles("collm_expert_wait_seconds", JOINT),
            ),
            Panel(
                21,
                "timeseries",
                "Run-ahead",
                "Tokens drafted past a deferral that were kept or thrown away: collm_runahead_tokens_total. 0 where "
                "the engine does not run ahead.",
                TOKENS,
                [Query(rate("collm_runahead_tokens_total", JOINT, "result"), "{{result}}")],
            ),
        ],
    ),
    Row(
        103,
        "Latency",
        [
            Panel(
                22,
                "timeseries",
                "Time to first token",
                "From the HTTP request to its first token: collm_time_to_first_token_seconds.",
                "s",
                quantiles("collm_time_to_first_token_seconds", ANY, "model_name"),
            ),
            Panel(
                23,
                "timeseries",
                "Between tokens",
                "From one token of a request to the next: collm_inter_token_seconds.",
                "s",
                quantiles("collm_inter_token_seconds", ANY, "model_name"),
            ),
            Panel(
                24,
                "timeseries",
                "Whole requests",
                "From the HTTP request to the end of its answer, however it ended: collm_request_seconds.",
                "s",
                quantiles("collm_request_seconds", ANY, "model_name"),
            ),
        ],
    ),
    Row(
        104,
        "Requests",
        [
            Panel(
                25,
                "timeseries",
                "Running and waiting",
                "Generation requests in the lanes, and those in the queue: collm_requests_running, "
                "collm_requests_waiting.",
                "short",
                [
                    Query(f"sum by (model_name) (collm_requests_running{{{JOINT}}})", "{{model_name}} running"),
                    Query(f"sum by (model_name) (collm_requests_waiting{{{JOINT}}})", "{{model_name}} waiting"),
                ],
            ),
            Panel(
                26,
                "timeseries",
                "Answered",
                "Requests that ended as they should, at a stop or at their length: collm_requests_total.",
                "reqps",
                [outcomes("stop", "{{model_name}} stop"), outcomes("length", "{{model_name}} length")],
            ),
            Panel(
                27,
                "timeseries",
                "Rejected, aborted, failed",
                "Requests that were not admitted, that their clients gave up, or that ended with an error: "
                "collm_requests_total.",
                "reqps",
                [
                    outcomes("rejected", "{{model_name}} rejected"),
                    outcomes("aborted", "{{model_name}} aborted"),
                    outcomes("error", "{{model_name}} failed"),
                ],
            ),
            Panel(
                28,
                "timeseries",
                "Share that fails",
                "Requests that ended with an error or were not admitted / all: collm_requests_total.",
                "percentunit",
                [
                    Query(
                        ratio(
                            rate("collm_requests_total", f'{ANY}, outcome=~"error|rejected"', "model_name"),
                            rate("collm_requests_total", ANY, "model_name"),
                        ),
                        "{{model_name}}",
                    )
                ],
                custom=SHARE,
            ),
            Panel(
                29,
                "timeseries",
                "HTTP responses",
                "Responses by status, probes and scrapes included: collm_http_requests_total. 499 is a client that "
                "hung up before the response began.",
                "reqps",
                [Query(rate("collm_http_requests_total", HERE, "route", "status"), "{{status}} {{route}}")],
            ),
            Panel(
                30,
                "timeseries",
                "Prompt tokens",
                "Tokens of the prompts of served requests: collm_prompt_tokens_total.",
                TOKENS,
                [Query(rate("collm_prompt_tokens_total", ANY, "model_name"), "{{model_name}}")],
            ),
        ],
    ),
    Row(
        105,
        "What runs",
        [
            Panel(
                31,
                "table",
                "Build and gate",
                "Version, gate and its default threshold, of each server: collm_build_info.",
                "none",
                [Query(f"collm_build_info{{{HERE}}}", instant=True, shape="table")],
                (12, 6),
                transformations=[
                    {
                        "id": "organize",
                        "options": {
                            "excludeByName": {"Time": True, "Value": True, "__name__": True},
                            "indexByName": {"job": 0, "instance": 1, "version": 2, "gate": 3, "threshold": 4},
                        },
                    }
                ],
            ),
            Panel(
                32,
                "stat",
                "Lanes up by instance",
                "1 while the lane can serve: collm_lane_up.",
                "none",
                [Query(f"collm_lane_up{{{JOINT}}}", "{{instance}} {{lane}}")],
                (7, 6),
                options={"colorMode": "background", "graphMode": "none"},
                custom=UP_OR_DOWN,
            ),
            Panel(
                33,
                "stat",
                "Gate, integrity and expert errors",
                "Requests of the time range that were ended because the gate's value was NaN or infinite: "
                "collm_gate_errors_total. Leftovers found in idle lanes: collm_integrity_errors_total. "
                "Deferrals whose expert was lost: collm_expert_failures_total. Any but 0 is a defect.",
                "short",
                [
                    Query(
                        f"sum by (model_name) (increase(collm_gate_errors_total{{{JOINT}}}[$__range]))",
                        "{{model_name}} gate",
                        instant=True,
                    ),
                    Query(
                        f"sum by (model_name) (increase(collm_integrity_errors_total{{{JOINT}}}[$__range]))",
                        "{{model_name}} integrity",
                        instant=True,
                    ),
                    Query(
                        f"sum by (model_name) (increase(collm_expert_failures_total{{{JOINT}}}[$__range]))",
                        "{{model_name}} expert lost",
                        instant=True,
                    ),
                ],
                (5, 6),
                options={"graphMode": "none"},
                custom=NONE_IS_GOOD,
            ),
        ],
    ),
]
