"""What ``--quick`` leaves out."""

from __future__ import annotations

NOT_QUICK = frozenset(
    {
        "cli/test_cluster.py",
        "cli/test_commands.py",
        "cli/test_demo.py",
        "cli/test_plan.py",
        "cli/test_terminal.py",
        "compat",
        "discovery/test_lan.py",
        "discovery/test_multicast.py",
        "faults/test_kills.py",
        "faults/test_leaving.py",
        "faults/test_overload.py",
        "faults/test_resuming.py",
        "faults/test_seeds.py",
        "faults/test_soak.py",
        "fuzz/test_cost.py",
        "integration",
        "model/test_architectures.py",
        "model/test_device.py",
        "model/test_edits.py",
        "model/test_grammars.py",
        "model/test_kv_quantization.py",
        "model/test_lane_caches.py",
        "model/test_loading.py",
        "model/test_marks.py",
        "model/test_prefixes.py",
        "model/test_prompt_scoring.py",
        "model/test_slices.py",
        "model/test_tensor_map.py",
        "model/test_warmup.py",
        "sandbox",
        "store/test_pull.py",
        "worker/test_stage_host.py",
        "worker/test_supervisor.py",
    }
)
"""The files, and folders of files, that start daemons, commands or engines, or load models, from ``tests``."""
