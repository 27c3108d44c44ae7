"""The dry run takes the path of a real run: thinkings of different lengths, at a cost that is known."""

from dataclasses import replace

import pytest
import torch

from tests.estimate.test_estimate import CPU, small
from trl_unigrpo.estimate import floor_flops, overhead_flops
from trl_unigrpo.estimate.counting import count_flops
from trl_unigrpo.trainers.dry_run import FixedLengths, dry_run, ragged_lengths, random_trainer


def test_lengths_are_spread_from_half_to_all_in_an_order_that_stays():
    load = small(completion_length=100, num_generations=24)
    lengths = ragged_lengths(load)
    assert (min(lengths), max(lengths), len(set(lengths))) == (50, 100, 24)
    assert sum(lengths) / 24 == pytest.approx(75, abs=0.5)
    assert lengths != sorted(lengths) and lengths == ragged_lengths(load)
    assert ragged_lengths(small(completion_length=1, num_generations=2)) == [1, 1]


def test_rows_end_where_they_should_and_nowhere_before():
    end, scores = 1, torch.zeros(3, 4)
    for new, ended in enumerate([[True, False, False], [False, False, True], [False, True, False]]):
        after = FixedLengths([1, 3, 2], 5, end)(torch.zeros(3, 5 + new, dtype=torch.long), scores)
        forced = torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf])
        free = torch.tensor([0.0, -torch.inf, 0.0, 0.0])
        torch.testing.assert_close(after, torch.stack([forced if row else free for row in ended]))


# Counted is more than the closed form at the mean length: contexts are padded to the longest of their micro-batch,
# and a thinking that has ended is decoded on beside the others. It is less than the closed form at the most.
def test_a_generation_has_these_lengths_and_costs_what_the_closed_form_says(tmp_path):
    load = small(lora_ranks=None, gradient_checkpointing=False, completion_length=12)
    lengths = ragged_lengths(load)
    assert sorted(lengths) == [6, 8, 10, 12]
    trainer = random_trainer(load, CPU, str(tmp_path), lengths)
    with count_flops() as counter:
        trainer.train()
    rows = [t for batch in trainer._buffered_inputs for t in batch["trajectories"]]
    assert {t.row: len(t.rounds[0].text_ids) for t in rows} == dict(enumerate(lengths))
    end = trainer.processing_class.eos_token_id
    assert all(t.rounds[0].text_ids.index(end) == len(t.rounds[0].text_ids) - 1 for t in rows)
    mean, most = (replace(load, completion_length=n) for n in (9, 12))
    least, limit = (sum(floor_flops(x).values()) + sum(overhead_flops(x).values()) for x in (mean, most))
    assert least < counter.get_total_flops() < limit
    assert counter.get_total_flops() == pytest.approx(least, rel=0.02)


def test_the_dry_run_is_ragged():
    load = small(num_iterations=1, gradient_checkpointing=False)
    assert dry_run(load, CPU).lengths == ragged_lengths(load)
    assert len(set(ragged_lengths(load))) == 4
