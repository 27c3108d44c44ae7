"""Credit of several rounds, by hand."""

import pytest
import torch

from trl_unigrpo.trainers.credit import before, choose_image, improvements, returns, round_advantages, running, slope


NAN = float("nan")


def advantages(led_to, earlier=None, baseline=0.0, rule="none", scale="group"):
    """Of one group in which all take part; its last column, from a list or a table."""
    led_to = torch.tensor(led_to)
    led_to = led_to if led_to.ndim == 2 else torch.stack([led_to, led_to], 1)
    earlier = torch.zeros_like(led_to) if earlier is None else torch.full_like(led_to, earlier)
    earlier = earlier[:, 1:]
    return round_advantages(led_to, earlier, baseline, rule, len(led_to), scale)[:, -1]


def test_returns_of_two_rounds():
    rewards = torch.tensor([[0.2, 0.9], [0.6, 0.6], [0.5, NAN]])
    painted = torch.tensor([[True, True], [True, False], [True, True]])  # the second keeps its image
    cost = 0.1
    torch.testing.assert_close(
        returns(rewards, painted, "final", cost),
        torch.tensor([[0.8, 0.9], [0.6, 0.7], [NAN, NAN]]),  # a step less than another image
        equal_nan=True,
    )
    torch.testing.assert_close(
        returns(rewards, painted, "own", cost), torch.tensor([[0.1, 0.8], [0.5, 0.6], [0.4, NAN]]), equal_nan=True
    )
    torch.testing.assert_close(
        returns(rewards, painted, "sum"), torch.tensor([[1.1, 0.9], [1.2, 0.6], [NAN, NAN]]), equal_nan=True
    )


def test_one_round_is_eq_1_whatever_is_paid():
    rewards = torch.rand(8, 1, generator=torch.Generator().manual_seed(0))
    groups = rewards.view(2, 4)
    expected = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(8, 1)
    for paid in ("final", "own", "sum"):
        led_to = returns(rewards, torch.ones(8, 1, dtype=torch.bool), paid)
        torch.testing.assert_close(
            round_advantages(led_to, before(rewards[:, :-1], 4), 1.0, "none", 4, "group"), expected
        )


def test_what_stood_before_is_subtracted_from_later_rounds_alone():
    rewards = torch.tensor([[0.0, 0.5], [0.5, 0.5], [1.0, 0.5], [0.5, 0.9]])
    earlier = before(rewards[:, :-1], 4)
    torch.testing.assert_close(earlier, torch.tensor([[0.0], [0.5], [1.0], [0.5]]))
    led_to = returns(rewards, torch.ones(4, 2, dtype=torch.bool), "final")
    plain, less = (round_advantages(led_to, earlier, b, "none", 4, "none") for b in (0.0, 1.0))
    torch.testing.assert_close(plain[:, 0], less[:, 0])
    torch.testing.assert_close(less[:, 1], torch.tensor([0.4, -0.1, -0.6, 0.3]))


def test_unknown_reward_of_the_image_before_subtracts_nothing():
    torch.testing.assert_close(
        before(torch.tensor([[0.2], [NAN], [NAN], [NAN]]), 2), torch.tensor([[0.2], [0.2], [0], [0]])
    )


def test_round_that_failed_is_masked_alone():
    """Own rewards: a judge that fails on one image leaves the other round, and the others' groups, as they were."""
    rewards = torch.tensor([[NAN, 0.5], [0.2, 0.6], [0.4, 0.1], [0.6, 0.2]])
    led_to = returns(rewards, torch.ones(4, 2, dtype=torch.bool), "own")
    found = round_advantages(led_to, before(rewards[:, :-1], 4), 0.0, "none", 4, "none")
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, -0.2, 0.0, 0.2]))
    torch.testing.assert_close(found[:, 1], torch.tensor([0.15, 0.25, -0.25, -0.15]))


def test_slope_is_that_of_least_squares_within_groups():
    generator = torch.Generator().manual_seed(0)
    earlier = torch.rand(8, 1, generator=generator)
    noise = torch.rand(8, 1, generator=generator)
    led_to = torch.cat([torch.zeros(8, 1), 0.4 * earlier + 0.3 * noise], 1)
    led_to[:4] += 5  # between groups there is nothing to learn
    x, y = (part.view(2, 4) for part in (earlier, led_to[:, 1]))
    x, y = (part - part.mean(1, keepdim=True) for part in (x, y))
    assert slope(led_to, earlier, 4) == pytest.approx(((x * y).sum() / (x * x).sum()).item(), rel=1e-5)
    assert slope(-led_to, earlier, 4) == 0
    assert slope(9 * led_to, earlier, 4) == 1
    led_to[3, 1] = NAN
    earlier[3] = 1e6  # of no account, as the round has no action
    assert 0 < slope(led_to, earlier, 4) < 1


def test_group_that_goes_on_from_one_image_has_no_slope():
    led_to, shared = torch.rand(24, 2, generator=torch.Generator().manual_seed(0)), torch.full((24, 1), 0.3)
    assert slope(led_to, shared, 24) is None
    # Nor does the source of an edit count, before the first round, beside the images before the second.
    earlier = torch.rand(24, 1, generator=torch.Generator().manual_seed(1))
    assert slope(led_to, torch.cat([shared, earlier], 1), 24) == slope(led_to, earlier, 24)


def test_running_mean_begins_with_the_first():
    assert running(None, None) is None
    assert running(None, 0.5) == running(0.5, None) == 0.5
    assert running(0.5, 1.0) == pytest.approx(0.55)


# No improvement: what AlphaGRPO's code and its text do to a group that started from 0.5.

GROUP = [0.62, 0.55, *[0.5] * 6, *[0.3] * 6]
BESSEL = (14 / 13) ** 0.5  # their code divides by the standard deviation of a population, TRL by that of a sample


@pytest.mark.parametrize(
    ("rule", "expected"), [("none", [1.70, 1.09, 0.65, -1.11]), ("clamp", [3.30, 1.16, -0.37, -0.37])]
)
def test_group_of_fourteen(rule, expected):
    found = BESSEL * advantages(GROUP, 0.5, rule=rule)[[0, 1, 2, 8]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=0.01, rtol=0)


@pytest.mark.parametrize(("rule", "tie"), [("none", 0.40), ("clamp", -0.58), ("min", -0.64)])
def test_tie_is_a_false_positive_until_it_is_rectified(rule, tie):
    group = [0.62, 0.50, 0.31, 0.55, 0.44, 0.20]
    assert advantages(group, 0.5, rule=rule)[1].item() == pytest.approx(tie, abs=0.01)


def test_where_nobody_improves_nothing_is_learnt_and_the_first_round_is_untouched():
    led_to, earlier = torch.tensor([[0.1, 0.3], [0.9, 0.4]]), torch.full((2, 1), 0.5)
    assert torch.equal(improvements(led_to, earlier, "clamp", 2), torch.tensor([[0.1, 0.0], [0.9, 0.0]]))
    found = round_advantages(led_to, earlier, 0.0, "clamp", 2, "group")
    assert found[:, 1].tolist() == [0, 0]
    assert found[1, 0] > 0.5


def test_edit_is_held_against_its_source():
    """With r_0 = .5 a first round that leaves the source as it was, or harms it, gains nothing."""
    led_to, source = torch.tensor([[0.9, 0.7], [0.5, 0.8], [0.2, 0.9]]), torch.full((3, 1), 0.5)
    earlier = torch.cat([source, torch.tensor([[0.9], [0.5], [0.2]])], 1)
    assert improvements(led_to, earlier, "clamp", 3)[:, 0].tolist() == pytest.approx([0.4, 0, 0])
    assert improvements(led_to, earlier, "min", 3)[:, 0].tolist() == pytest.approx([0.4, -0.3, -0.3])
    found = round_advantages(led_to, earlier, 0.0, "clamp", 3, "none")
    torch.testing.assert_close(found[:, 0], torch.tensor([0.8, -0.4, -0.4]) / 3)
    # A part of the same number for all of a group changes nothing.
    later = earlier[:, 1:]
    with_source, without = (round_advantages(led_to, x, 0.7, "none", 3, "group") for x in (earlier, later))
    torch.testing.assert_close(with_source, without)


def test_sum_of_stories_with_unequal_numbers_of_turns():
    """Of three turns, two and one; behind its last turn a story delivers nothing more."""
    rewards = torch.tensor(
        [[0.2, 0.4, 0.9], [0.6, 0.1, 0.3], [0.5, 0.7, 0.7], [0.1, 0.8, 0.8], [0.3, 0.3, 0.3], [0.9, 0.9, 0.9]]
    )
    acted = torch.tensor(
        [[True] * 3, [True] * 3, [True, True, False], [True, True, False]] + [[True, False, False]] * 2
    )
    led_to = returns(rewards, acted, "sum", counted=acted).masked_fill(~acted, NAN)
    expected = [[1.5, 1.3, 0.9], [1.0, 0.4, 0.3], [1.2, 0.7, NAN], [0.9, 0.8, NAN], [0.3, NAN, NAN], [0.9, NAN, NAN]]
    torch.testing.assert_close(led_to, torch.tensor(expected), equal_nan=True)
    stood = rewards[:, :-1].masked_fill(~acted[:, 1:], NAN)
    found = round_advantages(led_to, before(stood, 2), 0.5, "none", 2, "none")
    worth = [[1.5, 1.2, 0.7], [1.0, 0.1, 0.25], [1.2, 0.45], [0.9, 0.75], [0.3], [0.9]]
    for place in (0, 2, 4):
        for number, pair in enumerate(zip(worth[place], worth[place + 1], strict=True)):
            half = (pair[0] - pair[1]) / 2
            assert found[place : place + 2, number].tolist() == pytest.approx([half, -half])
    assert found[2:, 2].tolist() == [0] * 4
    assert found[4:, 1].tolist() == [0] * 2


def test_improvement_paid_to_the_round_before_it_teaches_to_paint_badly():
    """
    A toy of one number: round 1 paints x_1 ~ N(mu_1, 1), round 2 repaints, 30 % of it kept. A gradient step on the
    expected advantage of round 1 must raise mu_1; paid with the improvement it sinks.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6000, 2, generator=generator)
    first = noise[:, :1]
    rewards = torch.cat([first, 0.3 * first + noise[:, 1:]], 1)
    painted = torch.ones_like(rewards, dtype=torch.bool)

    def gradients(led_to, baseline):
        found = round_advantages(led_to, before(rewards[:, :-1], 24), baseline, "none", 24, "none")
        return (found * noise).mean(0)  # score function of either round's mean

    for paid in ("final", "sum", "own"):
        led_to = returns(rewards, painted, paid)
        for baseline in (0.0, slope(led_to, before(rewards[:, :-1], 24), 24), 1.0):
            first_round, second_round = gradients(led_to, baseline)
            assert first_round > 0.2
            assert second_round > 0.8
    improvement = (rewards[:, 1:] - rewards[:, :1]).expand(-1, 2)
    assert gradients(improvement, 0.0)[0] < -0.5


def test_baseline_leaves_the_gradient_and_takes_variance():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4800, 2, generator=generator)
    rewards = torch.stack([noise[:, 0], noise[:, 0] + 0.3 * noise[:, 1]], 1)  # the second edits what the first made
    led_to, earlier = returns(rewards, torch.ones(4800, 2, dtype=torch.bool), "final"), before(rewards[:, :-1], 24)
    best = slope(led_to, earlier, 24)
    assert best == pytest.approx(1.0, abs=0.02)
    plain, less = (round_advantages(led_to, earlier, b, "none", 24, "none")[:, 1] * noise[:, 1] for b in (0, best))
    assert plain.mean() == pytest.approx(0.3, abs=0.06)
    assert less.mean() == pytest.approx(0.3, abs=0.02)
    assert less.var() < 0.3 * plain.var()


# Whose image a group goes on from


def drawn(rewards, how, keep_perfect=0.0, times=400):
    generator = torch.Generator().manual_seed(0)
    found = [choose_image(torch.tensor(rewards), how, generator, 1.0, keep_perfect) for _ in range(times)]
    return [found.count(i) / times for i in range(len(rewards))]


def test_which_image_a_group_goes_on_from():
    rewards = [0.6, 0.2, NAN, 0.7]
    assert drawn(rewards, "worst") == [0, 1, 0, 0]
    assert drawn([0.1, 0.2, 0.2, 0.9], "spread") == [0, 0, 0, 1]
    shares = torch.tensor(drawn(rewards, "softmax", times=4000))[[0, 1, 3]]
    torch.testing.assert_close(shares, (-torch.tensor([0.6, 0.2, 0.7])).softmax(0), atol=0.03, rtol=0)
    shares = torch.tensor(drawn(rewards, "random", times=4000))
    torch.testing.assert_close(shares, torch.tensor([1.0, 1.0, 0.0, 1.0]) / 3, atol=0.03, rtol=0)
    assert drawn([NAN, NAN], "worst") == [1, 0]


def test_perfect_images_are_gone_on_from_now_and_then():
    assert drawn([1.0, 0.3, 1.0], "worst", 0.0) == [0, 1, 0]
    first, worst, third = drawn([1.0, 0.3, 1.0], "worst", 0.15, times=4000)
    assert first + third == pytest.approx(0.15, abs=0.02)
    assert first == pytest.approx(third, abs=0.03)
    assert worst == pytest.approx(0.85, abs=0.02)
    assert drawn([1.0, 1.0], "worst", 0.0, times=10) != [0, 0]
