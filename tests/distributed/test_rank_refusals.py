"""Bad input is refused on every rank, by a clear error, and no weight has changed; nothing hangs."""

import re

import pytest
from refusals import REFUSALS

SIZES = (2, 4)
NAN = "not finite at today's weights; nothing was changed"
OTHER = "differs between the ranks: .* on rank 0, .* on rank 1"
EXPECTED = {
    "other_anchors": ("ValueError", f"inputs: {OTHER}.*Give every rank the same anchors"),
    "other_count": ("ValueError", f"inputs: {OTHER}"),
    "other_check_inputs": ("ValueError", f"inputs: {OTHER}"),
    "other_dtype": ("ValueError", f"inputs: {OTHER}"),
    "other_options": ("ValueError", "chunk_size: .*: 4 on rank 0, 5 on rank 1"),
    "other_reference": ("ValueError", f"reference: {OTHER}"),
    "other_weights": ("ValueError", f"0.weight: {OTHER}.*DistributedDataParallel"),
    "few_anchors": ("ValueError", "inputs: . of them cannot be shared by . ranks"),
    "few_check_inputs": ("ValueError", ". of them cannot be shared by . ranks"),
    "few_drawn": ("ValueError", "batch_size: . of them cannot be shared by . ranks"),
    "no_group": ("TypeError", "process_group: must be a ProcessGroup, .* got str"),
    "no_backend": ("ValueError", "process_group: has no backend .*'cpu'.*'cuda:gloo'"),
    "built_before": ("RuntimeError", "built before torch.distributed was initialized"),
    "extended_otherwise": ("ValueError", f"inputs: {OTHER}"),
    "broken_at_refresh": ("ValueError", "outputs on the anchors are not finite"),
    "fully_sharded": ("TypeError", "FSDP1.*fully_shard"),
    "other_beta": ("ValueError", "beta of group 0: .*: 1.0 on rank 0, 2.0 on rank 1"),
    "other_solver": ("ValueError", f"solver: {OTHER}"),
    "other_parameters": ("ValueError", f"params: {OTHER}"),
    "zero_redundancy": ("ValueError", "ZeroRedundancyOptimizer, which divides them"),
    "not_averaged": ("RuntimeError", "gradient: it differs between the ranks.*DistributedData"),
    "gradient_of_one": ("RuntimeError", "the ranks do not take the same step: number 1 of rank"),
    "skipped_by_one": ("RuntimeError", "A batch is skipped on all ranks or on none"),
    "other_lr": ("RuntimeError", "lr, beta, momentum or the budget differ between the ranks"),
    "nan_gradient": ("RuntimeError", "gradient: holds NaN or infinite values"),
    "broken_step": ("RuntimeError", NAN),
    "broken_products": ("RuntimeError", NAN),
    "broken_budget": ("RuntimeError", NAN),
    "broken_settle": ("RuntimeError", "max_drift: the drift is inf.*The weights are as they were"),
}
# One rank is at fault; the others tell of it.
OF_ONE = {
    "one_fails": (1, "inputs: holds NaN or infinite values", "AnchorBatch: rank 1 raised Value"),
    "bad_option_of_one": (1, "momentum: must be in", "FIPOptimizer: rank 1 raised ValueError"),
    "broken_at_first": (-1, "outputs on the anchors are not finite", "AnchorBatch: rank . raised"),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", EXPECTED)
def test_every_rank_refuses(values, case, size):
    kind, message = EXPECTED[case]
    for told in values(size, case):
        for each in told if isinstance(told, list) else [told]:
            assert each["type"] == kind, each["message"]
            assert re.search(message, each["message"]), each["message"]
            assert each["kept"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", OF_ONE)
def test_what_one_rank_refuses_is_an_error_on_every_rank(values, case, size):
    at_fault, own, others = OF_ONE[case]
    told = values(size, case)
    faulty = told.pop(at_fault)
    assert faulty["type"] == "ValueError"
    assert re.search(own, faulty["message"])
    for each in told:
        assert each["type"] == "RuntimeError"
        assert re.search(others, each["message"])
        assert re.search(own, each["message"])


@pytest.mark.parametrize("size", SIZES)
def test_a_group_belongs_to_its_members(values, size):
    member, *others = values(size, "not_a_member")
    assert member["type"] == ""
    for each in others:
        assert each["type"] == "ValueError"
        assert "process_group: this process is no member of it" in each["message"]


@pytest.mark.parametrize("size", SIZES)
def test_figures_of_a_step_are_measured_by_all_ranks_or_by_none(values, size):
    for *unmeasured, measured in values(size, "not_measured"):
        assert len(unmeasured) == 3
        for each in unmeasured:
            assert each["type"] == "RuntimeError"
            assert "Call last_step.measure() on every rank first" in each["message"]
        assert measured["type"] == ""


def test_all_cases_are_tested():
    assert REFUSALS.keys() == {*EXPECTED, *OF_ONE, "not_a_member", "not_measured"}
