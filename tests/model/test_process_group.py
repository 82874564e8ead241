"""What a rank needs before NVIDIA's library can connect it: MLX ends the process where it is missing."""

from __future__ import annotations

import pytest

from cluster.core.errors import ModelUnsupported
from cluster.model.process_group import require_nccl

HOSTS = ("127.0.0.1:7001", "127.0.0.1:7002")


@pytest.mark.parametrize(("rank", "gpus"), [(0, 1), (1, 1), (0, 8), (2, 2), (3, 0)])
def test_a_rank_that_computes_where_it_sends_from_can_join(rank: int, gpus: int) -> None:
    require_nccl(rank, HOSTS, gpus)


def test_a_rank_that_would_send_from_another_gpu_is_refused() -> None:
    with pytest.raises(ModelUnsupported, match=r"rank 1 sees 2 GPUs.*CUDA_VISIBLE_DEVICES"):
        require_nccl(1, HOSTS, 2)


def test_ranks_that_meet_at_an_ipv6_address_are_refused() -> None:
    with pytest.raises(ModelUnsupported, match="IPv4 alone"):
        require_nccl(0, ("[::1]:7001", "[::1]:7002"), 1)
