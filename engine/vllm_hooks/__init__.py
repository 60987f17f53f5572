"""Everything that leans on vLLM's inside, and nothing else. Written for vLLM 0.32.

    scheduler.py   park, extend, evict: a subclass of vLLM's scheduler
    worker.py      gate values, asked positions, blends: a mixin for vLLM's workers
    worker_v1.py   token edits, and draws keyed by position, on vLLM's V1 model runner
    worker_v2.py   the same on its V2 model runner
    options.py     a lane's configuration as vLLM engine arguments
    lane.py        the lane itself: an EngineCore behind the interface of engine.lanes
    load.py        from an EngineConfig to lanes that fit each other

``tests/oracle/test_vllm_facts.py`` fails loudly when a vLLM version moves what is relied on here.
"""
