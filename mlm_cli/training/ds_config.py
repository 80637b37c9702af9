"""DeepSpeed's JSON: the only file that knows its keys.

Reference: deepspeed.readthedocs.io and ``deepspeed/runtime/config.py``, ``runtime/zero/config.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from mlm_cli.training.loss_scale import HYSTERESIS, MIN_SCALE

_BUCKET = 50_000_000  # elements reduced at once; DeepSpeed would set aside 500 million


def make_ds_config(
    *,
    micro_batch_size: int,
    accumulation: int,
    data_size: int,
    zero: int = 1,
    dtype: torch.dtype = torch.float32,
    clip_grad: float = 1.0,
    loss_scale_window: int = 1000,
    num_parameters: int | None = None,
    overlap: bool = False,
    offload: bool = False,
    pin_memory: bool = False,
) -> dict[str, Any]:
    """What DeepSpeed is given; also written to ``ds_config.json`` of the run.

    The optimizer is ours (one AdamW for both engines), so there is no ``optimizer`` section. Gradients are added up and
    averaged over ranks in float32 whatever the model computes in.

    Args:
        num_parameters: of this rank; keeps the reduction buffer from being larger than the model.
        overlap: reduce gradients (and at stage 3 gather weights) on a stream of their own while the backward pass goes
            on, in two buckets by turns. For GPUs: on the CPU both would share the same cores.
        offload: at stage 3 keep weights, masters and moments in the memory of the host.
        pin_memory: page-locked there, so that copies run beside the GPU's work.
    """
    assert zero in (1, 2, 3), "stage 0 is the plain engine"
    # At stages 1 and 2 DeepSpeed adds offloaded gradients up in the model's own precision, and after an update that was
    # passed over it goes on from spoiled ones (stage_1_and_2.py, async_accumulate_grad_in_cpu_via_gpu).
    assert zero == 3 or not offload, "offload is for stage 3"
    bucket = min(_BUCKET, num_parameters or _BUCKET)
    bucket += bucket % 2  # DeepSpeed wants an even number
    return {
        "train_batch_size": micro_batch_size * accumulation * data_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_grad,
        "zero_optimization": {
            "stage": zero,
            "overlap_comm": overlap,
            "contiguous_gradients": overlap,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **(_stage_3(num_parameters or _BUCKET) if zero == 3 else {}),
            **(_offload(pin_memory) if offload else {}),
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {
            "enabled": dtype == torch.float16,
            "loss_scale": 0,  # dynamic
            "loss_scale_window": loss_scale_window,
            "hysteresis": HYSTERESIS,
            "min_loss_scale": MIN_SCALE,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Activations between stages may differ over tensor ranks (sequence parallelism): send them as they are.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "wall_clock_breakdown": False,
        "steps_per_print": None,
    }


def _offload(pin_memory: bool) -> dict[str, Any]:
    """Rajbhandari et al. 2021 (ZeRO-Infinity); the update itself then runs on the host."""
    place = {"device": "cpu", "pin_memory": pin_memory}
    return {"offload_optimizer": place, "offload_param": dict(place)}


def _stage_3(num_parameters: int) -> dict[str, Any]:
    """Weights below the threshold (norms, biases) stay whole on every rank: gathering them costs more than it saves."""
    return {
        "stage3_param_persistence_threshold": min(100_000, num_parameters // 1000),
        "stage3_prefetch_bucket_size": min(_BUCKET, num_parameters // 2),
        "stage3_max_live_parameters": num_parameters,
        "stage3_max_reuse_distance": num_parameters,
    }
