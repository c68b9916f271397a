"""The mathematics of refinement: by hand, against definitions written anew, and on problems of known optimum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whyrank.training import ppo_math as pm

NAN = math.nan


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Double precision, so that expected values can be compared closely."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    yield
    torch.set_default_dtype(before)


def mask_of(lengths: list[int], longest: int) -> Tensor:
    return (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).double()


MASK = mask_of([3, 1], 3)


def close(found: Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=tolerance, atol=tolerance)


# ---- by hand ------------------------------------------------------------------------------------------------


def test_masked_mean_by_hand() -> None:
    """(1 + 2 + 6 + 7) / 4; a mean of means would be (3 + 7) / 2."""
    close(pm.masked_mean(torch.tensor([[1.0, 2, 6], [7, NAN, NAN]]), MASK), 4.0)


def test_restricted_by_hand() -> None:
    """Labels of probability .1, .3 and .1: a fifth, three fifths, a fifth of their half."""
    found = pm.restricted(torch.tensor([[0.1, 0.3, 0.1], [0.2, 0.2, 0.4]]).log()).exp()
    close(found, [[0.2, 0.6, 0.2], [0.25, 0.25, 0.5]])
    close(pm.restricted(torch.tensor([[[0.1, 0.3]], [[0.2, 0.2]]]).log()).exp(), [[[0.25, 0.75]], [[0.5, 0.5]]])


def test_kl_estimates_by_hand() -> None:
    """p = 1/2, q = 1/4: k1 = log 2, k3 = 1/2 - 1 + log 2."""
    log_p, log_q = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    close(pm.kl_k1(log_p, log_q), [math.log(2), -math.log(2)])
    close(pm.kl_k3(log_p, log_q), [math.log(2) - 0.5, 1 - math.log(2)])


def test_entropy_by_hand() -> None:
    """Four equal ones: log 4. (1/2, 1/4, 1/4): 1/2 log 2 + 1/2 log 4 = 3/2 log 2."""
    logits = torch.tensor([[[5.0, 5, 5, 5]], [[math.log(8), math.log(4), math.log(4), -1e9]]])
    close(pm.entropy(logits), [[math.log(4)], [1.5 * math.log(2)]])


def test_token_rewards_by_hand() -> None:
    """Each nat costs .1; the reward comes with the third action of the first and the only one of the second."""
    kl = torch.tensor([[1.0, -2, 3], [4, NAN, NAN]], requires_grad=True)
    found = pm.token_rewards(torch.tensor([5.0, -1]), kl, MASK, 0.1)
    close(found, [[-0.1, 0.2, 4.7], [-1.4, 0, 0]])
    assert not found.requires_grad


def test_discounted_advantages_by_hand() -> None:
    """discount .5, trace .5, rewards (0, 0, 8), values (1, 2, 4).

    deltas: 0 + .5*2 - 1 = 0; 0 + .5*4 - 2 = 0; 8 - 4 = 4. Advantages: 4, 0 + .25*4 = 1, .25. Second rollout: 3 - 1 = 2.
    """
    rewards = torch.tensor([[0.0, 0, 8], [3, NAN, NAN]])
    values = torch.tensor([[1.0, 2, 4], [1, NAN, NAN]], requires_grad=True)
    advantages, returns = pm.discounted_advantages(rewards, values, MASK, discount=0.5, trace=0.5)
    close(advantages, [[0.25, 1, 4], [2, 0, 0]])
    close(torch.where(MASK > 0, returns, 0.0), [[1.25, 3, 8], [3, 0, 0]])
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_whiten_by_hand() -> None:
    """(1, 3, 5, 7) has mean 4 and variance (9 + 1 + 1 + 9) / 4 = 5; with epsilon 4 it is divided by 3."""
    values = torch.tensor([[1.0, 3, 5], [7, NAN, NAN]])
    close(pm.whiten(values, MASK, epsilon=4.0), [[-1, -1 / 3, 1 / 3], [1, 0, 0]])
    root = math.sqrt(5)
    close(pm.whiten(values, MASK), [[-3 / root, -1 / root, 1 / root], [3 / root, 0, 0]], 1e-8)
    # Without variance the default epsilon decides: 0 and not a division by zero.
    close(pm.whiten(torch.tensor([[2.0, 2, 2], [2, NAN, NAN]]), MASK), torch.zeros(2, 3))
    tiny = torch.tensor([[-1e-4, 0.0, 1e-4], [0, NAN, NAN]])  # variance 5e-9; with epsilon 1e-8 divided by sqrt(1.5e-8)
    close(pm.whiten(tiny, MASK)[0, 2], 1e-4 / math.sqrt(1.5e-8), 1e-9)


def test_group_advantages_by_hand() -> None:
    """(0, 0, 3): mean 1, deviations (-1, -1, 2), standard deviation sqrt(6 / 2)."""
    rewards = torch.tensor([[0.0, 0, 3], [0.75, 0.75, 0.75]])
    scale = math.sqrt(3) + 1e-4
    close(pm.group_advantages(rewards), [[-1 / scale, -1 / scale, 2 / scale], [0, 0, 0]])
    close(pm.group_advantages(rewards, epsilon=1.0)[0, 2], 2 / (math.sqrt(3) + 1))
    close(pm.group_advantages(rewards, is_scaled=False), [[-1, -1, 2], [0, 0, 0]])


def test_leave_one_out_by_hand() -> None:
    """(0, 1, 5): the others' means are 3, 2.5 and .5. A pair of equal samples has nothing above."""
    close(pm.leave_one_out(torch.tensor([[0.0, 1, 5], [3, 3, 3]])), [[-3, -1.5, 4.5], [0, 0, 0]])


def test_policy_loss_by_hand() -> None:
    """clip .2 and n = 10. Gains: ratio 2, A 1: 1.2; ratio .5, A 1: .5; ratio 2, A -1: -2; ratio .5, A -1: -.8."""
    new = torch.tensor([[2.0, 0.5, 2], [0.5, 1, 1]]).log()
    new[1, 1:] = NAN
    advantages = torch.tensor([[1.0, 1, -1], [-1, NAN, NAN]])
    loss = pm.policy_loss(new, torch.zeros(2, 3), advantages, MASK, clip=0.2, num_actions=10)
    close(loss, -(1.2 + 0.5 - 2 - 0.8) / 10)


def test_clip_share_by_hand() -> None:
    """Ratios 1.3, 1.1, .7 and .9 with clip .2: two of four are outside; with .25, too; with .05, all."""
    new = torch.tensor([[1.3, 1.1, 0.7], [0.9, NAN, NAN]]).log()
    found = [float(pm.clip_share(new, torch.zeros(2, 3), MASK, clip=clip)) for clip in (0.2, 0.25, 0.05, 0.35)]
    assert found == [0.5, 0.5, 1.0, 0.0]
    edge = pm.clip_share(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), clip=0.0)
    assert edge == 0.0  # exactly at the edge is inside


def test_value_loss_by_hand() -> None:
    """clip 1, old values 0, n = 5. (V, G) = (3, 1): max(4, 0); (3, 5): max(4, 16); (.5, 1): 1/4; (-3, 0): max(9, 1)."""
    values = torch.tensor([[3.0, 3, 0.5], [-3, NAN, NAN]], requires_grad=True)
    old = torch.tensor([[0.0, 0, 0], [0, NAN, NAN]])
    returns = torch.tensor([[1.0, 5, 1], [0, NAN, NAN]])
    loss = pm.value_loss(values, old, returns, MASK, clip=1.0, num_actions=5)
    close(loss, (4 + 16 + 0.25 + 9) / 2 / 5)
    # Below as above: V -3 with G -5 keeps to -1, and max(4, 16) counts.
    low = pm.value_loss(torch.tensor([[-3.0]]), *torch.tensor([[[0.0]], [[-5.0]], [[1.0]]]), clip=1.0, num_actions=1)
    close(low, 8.0)
    (gradient,) = torch.autograd.grad(loss, values)
    # Unclipped where the plain error is larger: (V - G) / n; the second is clipped flat.
    close(gradient, [[2 / 5, 0, -0.5 / 5], [-3 / 5, 0, 0]])


def test_explained_variance_by_hand() -> None:
    """Returns (0, 2, 4, 2) have variance 2. Errors (0, 0, 0, 2): variance 3/4. A constant error harms nothing."""
    returns = torch.tensor([[0.0, 2, 4], [2, NAN, NAN]])
    close(pm.explained_variance(torch.tensor([[0.0, 2, 4], [0, NAN, NAN]]), returns, MASK), 1 - 0.75 / 2)
    close(pm.explained_variance(returns + 7, returns, MASK), 1.0)
    close(pm.explained_variance(torch.zeros(2, 3), returns, MASK), 0.0)
    close(pm.explained_variance(returns, torch.ones(2, 3), MASK), 0.0)
    small = returns / 10  # variance .02
    close(pm.explained_variance(small, small, MASK), 1.0)


def test_adapted_coefficient_by_hand() -> None:
    """Half too much, capped at a fifth: .1 * (1 + .2 * 64 / 640). A tenth too little: .1 * (1 - .1 * .1)."""
    settings_ = {"target": 0.1, "horizon": 640, "num_rollouts": 64}
    assert pm.adapted_coefficient(0.1, 0.15, **settings_) == pytest.approx(0.102)  # type: ignore[arg-type]
    assert pm.adapted_coefficient(0.1, 0.01, **settings_) == pytest.approx(0.098)  # type: ignore[arg-type]
    assert pm.adapted_coefficient(0.1, 0.09, **settings_) == pytest.approx(0.099)  # type: ignore[arg-type]
    assert pm.adapted_coefficient(0.1, 0.1, **settings_) == 0.1  # type: ignore[arg-type]


def test_likelihood_by_hand() -> None:
    """Weights 8, 0 (of a negative reward); -(8 * (-1 - 2 - 3) + 0) / 6 = 8. With power 1: 2."""
    close(pm.likelihood_weights(torch.tensor([2.0, -2, 0.5])), [8, 0, 0.125])
    close(pm.likelihood_weights(torch.tensor([2.0, -2, 0.5]), power=1.0), [2, 0, 0.5])
    log_probs = torch.tensor([[-1.0, -2, -3], [-4, NAN, NAN]], requires_grad=True)
    weights = torch.tensor([8.0, 0.5], requires_grad=True)
    loss = pm.likelihood_loss(log_probs, weights, MASK, num_actions=6)
    close(loss, (8 * 6 + 0.5 * 4) / 6)
    loss.backward()
    close(log_probs.grad, [[-8 / 6] * 3, [-0.5 / 6, 0, 0]])  # type: ignore[arg-type]
    assert weights.grad is None


# ---- against the definitions, written out anew ----------------------------------------------------------------


def advantages_by_sums(
    rewards: list[float], values: list[float], discount: float, trace: float
) -> tuple[list[float], list[float]]:
    """Equation 16 of the source as it stands: a sum over later temporal differences; and V + A."""
    longest = len(rewards)
    later = [*values, 0.0]
    deltas = [rewards[t] + discount * later[t + 1] - values[t] for t in range(longest)]
    found = [sum((discount * trace) ** (u - t) * deltas[u] for u in range(t, longest)) for t in range(longest)]
    return found, [a + v for a, v in zip(found, values, strict=True)]


NUMBERS = st.floats(-3, 3, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=5), min_size=1, max_size=4),
    discount=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    trace=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
)
def test_advantages_are_sums_of_temporal_differences(
    rows: list[list[tuple[float, float]]], discount: float, trace: float
) -> None:
    longest = max(map(len, rows)) + 1
    padded = torch.full((2, len(rows), longest), NAN)
    for number, row in enumerate(rows):
        padded[:, number, : len(row)] = torch.tensor(row).T
    mask = mask_of([len(row) for row in rows], longest)
    found = pm.discounted_advantages(padded[0], padded[1], mask, discount=discount, trace=trace)
    for number, row in enumerate(rows):
        expected = advantages_by_sums([r for r, _ in row], [v for _, v in row], discount, trace)
        for tensor, values in zip(found, expected, strict=True):
            close(tensor[number, : len(row)], values, 1e-9)
    assert not found[0][mask == 0].any()
    assert not found[1][mask == 0].any()


def test_with_trace_one_the_return_is_the_discounted_sum_of_rewards() -> None:
    """Whatever the values are: the law by which trace 1 is Monte Carlo. 1 + .5*2 + .25*4 = 3, 2 + .5*4 = 4, 4."""
    for values in (torch.zeros(1, 3), torch.randn(1, 3)):
        _, returns = pm.discounted_advantages(
            torch.tensor([[1.0, 2, 4]]), values, torch.ones(1, 3), discount=0.5, trace=1.0
        )
        close(returns, [[3, 4, 4]])


def test_kl_estimates_and_entropy_are_exact_in_expectation() -> None:
    """Over a vocabulary of 5, expectations are sums: both estimates give sum p log(p / q)."""
    p, q = torch.randn(5).softmax(0), torch.randn(5).softmax(0)
    exact_kl = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
    assert exact_kl > 0.05
    for estimate in (pm.kl_k1, pm.kl_k3):
        close((p * estimate(p.log(), q.log())).sum(), exact_kl)
    assert (pm.kl_k3(p.log(), q.log()) >= 0).all()
    assert (pm.kl_k1(p.log(), q.log()) < 0).any()
    close(pm.entropy(p.log() + 3), -sum(float(a) * math.log(float(a)) for a in p))


def test_the_price_of_a_whole_answer_is_the_kl_between_the_two_policies() -> None:
    """A two-token policy over three tokens: the expected sum of k1 along an answer is the KL of the answers."""
    first, second = torch.randn(2, 3).log_softmax(1), torch.randn(2, 3, 3).log_softmax(2)
    total, answers_kl = 0.0, 0.0
    for a, b in product(range(3), repeat=2):
        log_p, log_q = (torch.stack([first[i, a], second[i, a, b]]) for i in (0, 1))
        p, q = log_p.sum().exp(), log_q.sum().exp()
        priced = pm.token_rewards(torch.zeros(1), pm.kl_k1(log_p, log_q)[None], torch.ones(1, 2), 1.0)
        total -= float(p * priced.sum())
        answers_kl += float(p * (p / q).log())
    assert total == pytest.approx(answers_kl)


# ---- laws of the losses ---------------------------------------------------------------------------------------


def test_before_the_first_update_the_gradient_is_that_of_reinforce() -> None:
    """The ratio is 1 and nothing is clipped: the gradient is -A / n at every action, and the loss -sum A / n."""
    log_probs = torch.randn(2, 3, requires_grad=True)
    advantages = torch.randn(2, 3)
    loss = pm.policy_loss(log_probs, log_probs, advantages, MASK, clip=0.2, num_actions=4)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    close(gradient, -advantages * MASK / 4)
    close(loss, -(advantages * MASK).sum() / 4)
    assert float(pm.clip_share(log_probs, log_probs, MASK, clip=1e-9)) == 0.0


def test_without_advantage_there_is_no_gradient() -> None:
    log_probs = torch.randn(2, 3, requires_grad=True)
    loss = pm.policy_loss(log_probs, torch.randn(2, 3), torch.zeros(2, 3), MASK, clip=0.2, num_actions=4)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert not gradient.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "is_flat"), [(1.3, 1, True), (0.7, -1, True), (1.3, -1, False), (0.7, 1, False)]
)
def test_the_gradient_ends_where_the_ratio_has_gone_far_enough(ratio: float, advantage: float, is_flat: bool) -> None:
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    loss = pm.policy_loss(log_probs, zero, advantage * one, one, clip=0.2, num_actions=1)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    close(gradient, [[0.0 if is_flat else -ratio * advantage]])


def test_parts_padding_and_order_of_a_batch_change_nothing() -> None:
    """Eight rollouts at once, one by one, in another order, and with more padding: the same loss and gradient."""
    lengths = [1, 4, 2, 3, 4, 1, 2, 2]
    mask, num = mask_of(lengths, 4), sum(lengths)
    log_probs, old, advantages = torch.randn(8, 4), torch.randn(8, 4), torch.randn(8, 4)
    weights = torch.rand(8)

    def losses(rows: list[int], width: int) -> Tensor:
        wide = [torch.full((8, width), NAN) for _ in range(3)]
        for tensor, source in zip(wide, (leaf, old, advantages), strict=True):
            tensor[:, :4] = torch.where(mask > 0, source, NAN)
        wide_mask = torch.zeros(8, width)
        wide_mask[:, :4] = mask
        new, before, gain = (tensor[rows] for tensor in wide)
        shown = wide_mask[rows]
        return (
            pm.policy_loss(new, before, gain, shown, clip=0.2, num_actions=num)
            + 3 * pm.value_loss(new, before, gain, shown, clip=0.2, num_actions=num)
            + 5 * pm.likelihood_loss(new, weights[rows], shown, num_actions=num)
        )

    results = []
    for parts, width in (
        ([list(range(8))], 4),
        ([[i] for i in range(8)], 4),
        ([[7, 3, 1], [0, 2, 4, 5, 6]], 4),
        ([list(range(8))[::-1]], 9),
    ):
        leaf = log_probs.clone().requires_grad_()
        total = torch.zeros(())
        for rows in parts:
            part = losses(rows, width)
            part.backward()
            total = total + part.detach()
        assert leaf.grad is not None
        results.append((total, leaf.grad))
    for total, gradient in results[1:]:
        close(total, results[0][0], 1e-10)
        close(gradient, results[0][1], 1e-10)


# ---- problems with a known optimum ------------------------------------------------------------------------------


def test_a_bandit_is_solved() -> None:
    """Four arms; arm 2 pays 1, the others .2. Group advantages, several epochs on the same draws."""
    logits = torch.zeros(4, requires_grad=True)
    pay = torch.tensor([0.2, 0.2, 1.0, 0.2])
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(60):
        old = logits.log_softmax(0).detach()
        arms = torch.multinomial(old.exp(), 32, replacement=True)
        advantages = pm.group_advantages(pay[arms][None])[0][:, None]
        for _ in range(3):
            new = logits.log_softmax(0)[arms][:, None]
            loss = pm.policy_loss(new, old[arms][:, None], advantages, torch.ones(32, 1), clip=0.2, num_actions=32)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert float(logits.detach().softmax(0)[2]) > 0.95


def test_a_priced_bandit_ends_at_the_tilted_reference() -> None:
    """With price b per nat the optimum is p ~ q exp(r / b), here q = (.5, .3, .2), r = (0, 1, 0), b = 1:
    (.5, .3 e, .2) / (.7 + .3 e)."""
    q, pay = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 1.0, 0.0])
    best = q * pay.exp() / (q * pay.exp()).sum()
    logits = q.log().clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=1.0)
    arms = torch.arange(3)
    ones = torch.ones(3, 1)
    for _ in range(400):
        old = logits.log_softmax(0).detach()
        rewards = pm.token_rewards(pay, pm.kl_k1(old, q.log())[:, None], ones, 1.0)
        baseline = (old.exp() * rewards[:, 0]).sum().expand(3, 1)
        advantages, _ = pm.discounted_advantages(rewards, baseline, ones, discount=1.0, trace=1.0)
        # Every arm once, weighted by its probability: the exact expectation in place of draws.
        new = logits.log_softmax(0)[arms][:, None]
        weighted = advantages * old.exp()[:, None]
        loss = pm.policy_loss(new, old[:, None], weighted, ones, clip=0.2, num_actions=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    close(logits.softmax(0).detach(), best, 1e-4)


def test_a_decision_process_of_two_steps_is_solved() -> None:
    """The first action leads to a state, the second is paid: (0, 1) pays 1, (1, 0) pays .6, all else 0. Greedy after
    one look at the average pay of a first action under the uniform policy would not tell; the values have to learn."""
    pay = torch.tensor([[0.0, 1.0], [0.6, 0.0]])
    policy = torch.zeros(3, 2, requires_grad=True)  # states: start, after 0, after 1
    critic = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([policy, critic], lr=0.05)
    mask = torch.ones(64, 2)
    for _ in range(150):
        table = policy.log_softmax(1).detach()
        first = torch.multinomial(table[0].exp(), 64, replacement=True)
        second = torch.multinomial(table[1 + first].exp(), 1)[:, 0]
        states, actions = torch.stack([torch.zeros_like(first), 1 + first], 1), torch.stack([first, second], 1)
        old, old_values = table[states, actions], critic[states].detach()
        rewards = pm.token_rewards(pay[first, second], torch.zeros(64, 2), mask, 0.1)
        advantages, returns = pm.discounted_advantages(rewards, old_values, mask, discount=1.0, trace=0.9)
        advantages = pm.whiten(advantages, mask)
        for _ in range(2):
            new = policy.log_softmax(1)[states, actions]
            loss = pm.policy_loss(new, old, advantages, mask, clip=0.2, num_actions=128)
            loss = loss + pm.value_loss(critic[states], old_values, returns, mask, clip=0.2, num_actions=128)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    probs = policy.softmax(1).detach()
    assert float(probs[0, 0] * probs[1, 1]) > 0.9
    assert float(critic.detach()[1]) == pytest.approx(1.0, abs=0.15)
    found = pm.explained_variance(critic[states].detach(), returns, mask)
    assert float(found) <= 1.0


def test_reward_weighted_likelihood_moves_to_what_was_rewarded() -> None:
    """Fitting draws of weights w has its optimum at shares ~ count * w: 2 * 1 and 1 * 8 of ten."""
    logits = torch.zeros(2, requires_grad=True)
    weights = pm.likelihood_weights(torch.tensor([1.0, 1.0, 2.0]))
    drawn = torch.tensor([0, 0, 1])
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(200):
        new = logits.log_softmax(0)[drawn][:, None]
        loss = pm.likelihood_loss(new, weights, torch.ones(3, 1), num_actions=3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    close(logits.softmax(0).detach(), [0.2, 0.8], 1e-6)
