"""Bad input gets a sentence: the value seen, what is allowed, what to do."""

import pytest
import torch
import torch.distributed as dist

import lasp
from tests.lasp import cases


def call(**changes):
    arguments = dict(
        q=torch.randn(1, 10, 2, 4),
        k=torch.randn(1, 10, 2, 4),
        v=torch.randn(1, 10, 2, 6),
        log_decay=torch.tensor([-0.1, -0.2]),
    )
    arguments.update(changes)
    return lasp.lightning_attention(**arguments)


def offsets(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def by_token(changes, shape=(1, 10, 2)):
    """A decay per token, weak but for these."""
    log_decay = torch.full(shape, -0.1)
    for where, value in changes.items():
        log_decay[where] = value
    return log_decay


BAD = {
    "positive slopes": (dict(log_decay=torch.tensor([0.5, 0.25])), r"head 0 is 0.5.*negative"),
    "infinite decay": (dict(log_decay=torch.tensor([-0.5, -torch.inf])), r"head 1 is -inf"),
    "nan decay": (dict(log_decay=torch.tensor([-0.5, torch.nan])), r"head 1 is nan"),
    "decay without a batch": (dict(log_decay=torch.zeros(10, 2)), r"\[10, 2\].*float32 \[2\]"),
    "decay per sequence": (dict(log_decay=torch.zeros(1, 2)), r"\[1, 2\].*\[1, 10, 2\], one per"),
    "decay of four dimensions": (
        dict(log_decay=torch.zeros(1, 10, 2, 1)),
        r"\[1, 10, 2, 1\].*\[1, 10, 2\]",
    ),
    "decay per token and no head": (
        dict(log_decay=torch.zeros(1, 10, 1)),
        r"\[1, 10, 1\].*\[1, 10, 2\]",
    ),
    "one decay for two sequences": (
        {x: torch.randn(2, 10, 2, 4) for x in "qkv"} | dict(log_decay=torch.zeros(1, 10, 2)),
        r"\[1, 10, 2\].*\[2, 10, 2\]",
    ),
    **{
        f"decay per token in {dtype}": (
            dict(log_decay=torch.zeros(1, 10, 2, dtype=dtype)),
            rf"{dtype}.*float32",
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    },
    "positive decay of a token": (
        dict(log_decay=by_token({(0, 7, 1): 0.5, (0, 9, 0): 1.0})),
        r"is 0.5 at \[0, 7, 1\]: it must be <= 0",
    ),
    "infinite growth": (dict(log_decay=by_token({(0, 0, 0): torch.inf})), r"inf at \[0, 0, 0\]"),
    "nan decay of a token": (
        dict(log_decay=by_token({(0, 3, 0): torch.nan})),
        r"nan at \[0, 3, 0\]",
    ),
    "decay in bf16": (dict(log_decay=torch.zeros(2).bfloat16()), r"bfloat16.*float32"),
    "decay wants a gradient": (
        dict(log_decay=torch.zeros(2, requires_grad=True)),
        r"constant.*detach",
    ),
    "three dimensions": (dict(q=torch.randn(10, 2, 4)), r"\[10, 2, 4\].*4 dimensions"),
    "k of another size": (dict(k=torch.randn(1, 10, 2, 5)), r"do not fit"),
    "v of another length": (dict(v=torch.randn(1, 9, 2, 6)), r"do not fit"),
    "mixed dtypes": (dict(k=torch.randn(1, 10, 2, 4).half()), r"float32, k torch.float16"),
    "integers": (
        {x: torch.ones(1, 10, 2, 4, dtype=torch.long) for x in "qkv"},
        r"int64.*allowed are bfloat16",
    ),
    "heads too wide": (dict(v=torch.randn(1, 10, 2, 257)), r"257\].*1\.\.256"),
    "unknown exchange": (dict(exchange="pigeon"), r"'pigeon'.*all_gather, auto, doubling, ring"),
    "state of another shape": (
        dict(initial_state=torch.zeros(1, 2, 6, 4)),
        r"\[1, 2, 6, 4\].*\[1, 2, 4, 6\]",
    ),
    "state in bf16": (dict(initial_state=torch.zeros(1, 2, 4, 6).bfloat16()), r"must be torch.fl"),
    "a list of decays": (dict(log_decay=[-0.1, -0.2]), "log_decay is list: it must be a tensor"),
    "a list of offsets": (dict(cu_seqlens=[0, 10]), "cu_seqlens is list: it must be a tensor"),
    "ranks for a group": (dict(group=2), r"group is int: it must be .*ProcessGroup"),
    "no scale": (dict(scale=None), "scale is None: it must be a number"),
    "no v": (dict(v=None), "v is NoneType: it must be a tensor"),
    "exchange of another type": (dict(exchange=["ring"]), r"\['ring'\].*choose one"),
    "offsets descend": (dict(cu_seqlens=offsets(0, 6, 4, 10)), r"descends from 6 to 4 at entry 2"),
    "offsets end early": (dict(cu_seqlens=offsets(0, 4, 8)), r"ends at 8.*hold 10"),
    "offsets start late": (dict(cu_seqlens=offsets(1, 4, 10)), r"must start with 0"),
    "one offset": (dict(cu_seqlens=offsets(0)), r"1 entries.*\[0, tokens\]"),
    "float offsets": (dict(cu_seqlens=offsets(0, 10, dtype=torch.float32)), r"must be int32"),
    "packed batch": (
        {x: torch.randn(2, 10, 2, 4) for x in "qkv"} | dict(cu_seqlens=offsets(0, 10)),
        r"batch is 2.*batch 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_is_refused_with_a_sentence(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_mixed_devices_are_refused():
    with pytest.raises(ValueError, match="q is on cpu but v on meta: move both"):
        call(v=torch.empty(1, 10, 2, 6, device="meta"))
    with pytest.raises(ValueError, match="q is on cpu but log_decay on meta: move both"):
        call(log_decay=torch.zeros(1, 10, 2, device="meta"))


def test_a_step_refuses_a_whole_sequence_and_a_wrong_state():
    q, v = torch.randn(1, 2, 4), torch.randn(1, 2, 6)
    state = torch.zeros(1, 2, 4, 6)
    with pytest.raises(ValueError, match="one token's q and k are"):
        lasp.lightning_attention_step(q[None], q[None], v[None], state)
    with pytest.raises(ValueError, match=r"state is torch.float32 \[1, 2, 6, 4\]"):
        lasp.lightning_attention_step(q, q, v, state.transpose(2, 3))
    with pytest.raises(ValueError, match="must be tensors; a first state is torch.zeros"):
        lasp.lightning_attention_step(q, q, v, None)
    with pytest.raises(ValueError, match="head 0 is 0.5"):
        lasp.lightning_attention_step(q, q, v, state, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("log_decay", "message"),
    [
        (torch.zeros(3, 2), r"is \[3, 2\]: it must be \[2\].*or \[1, 2\], one per sequence"),
        (torch.zeros(1, 3), r"is \[1, 3\]: it must be"),
        (torch.zeros(1, 1, 2), r"is \[1, 1, 2\]: it must be"),
        (torch.zeros(1, 2).bfloat16(), r"bfloat16.*float32"),
        (torch.tensor([[-0.5, 0.5]]), r"is 0.5 at \[0, 1\]: it must be <= 0"),
        (torch.tensor([[torch.nan, -0.5]]), r"is nan at \[0, 0\]"),
    ],
)
def test_a_step_refuses_a_wrong_decay_of_its_token(log_decay, message):
    q, v = torch.randn(1, 2, 4), torch.randn(1, 2, 6)
    with pytest.raises(ValueError, match=message):
        lasp.lightning_attention_step(q, q, v, torch.zeros(1, 2, 4, 6), log_decay)


def test_good_input_is_accepted():
    assert call().shape == (1, 10, 2, 6)
    assert call(log_decay=by_token({(0, 4, 1): -torch.inf})).shape == (1, 10, 2, 6)


def misfit(group, what):
    T = {"odd": 3, "length": 11}.get(what, 10)
    q, k, v, log_decay, state = cases.make_inputs(T)
    documents = {"short": (0, 8, 19), "length": (0, 8, 20)}.get(what)
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    lengths = {"ranks": (10, 10, 10), "short": (10, 10), "number": (1.5, 2)}.get(what)
    layout = {"odd": "zigzag", "spiral": "spiral"}.get(what, "contiguous")
    options = dict(cu_seqlens=cu_seqlens, shard_lengths=lengths, layout=layout)
    if what == "gradient" and dist.get_rank(group) == 0:
        options["initial_state"] = state.requires_grad_()
    lasp.lightning_attention(q, k, v, log_decay, group=group, **options)


@pytest.mark.parametrize(
    "what, message",
    [
        ("odd", "holds 3 tokens in zigzag"),
        ("length", "holds 11 tokens, but its shard is 10"),
        ("ranks", "shard_lengths has 3 entries, the group 2 ranks"),
        ("short", "are 20 tokens together, but cu_seqlens ends at 19"),
        ("number", r"shard_lengths is \(1.5, 2\): give the tokens"),
        ("spiral", "layout is 'spiral': choose one of contiguous, zigzag"),
        ("gradient", "neither k nor v does"),
    ],
)
def test_shards_that_do_not_fit_are_refused_on_every_rank(pool, what, message):
    for outcome in pool.outcomes(misfit, what, size=2):
        with pytest.raises(ValueError, match=message):
            raise outcome


def trained_state_in_evaluation(group, mode):
    q, k, v, log_decay, state = cases.make_inputs(10)
    given = torch.nn.Parameter(state) if dist.get_rank(group) == 0 else None
    with mode():
        return lasp.lightning_attention(q, k, v, log_decay, initial_state=given, group=group)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_trained_initial_state_over_ranks_is_accepted_without_gradients(pool, mode):
    for o in pool.run(trained_state_in_evaluation, mode, size=2):
        assert o.shape[1] == 10 and o.isfinite().all()


def with_decays(group, decays, gradients, of_keys):
    """A call of which ranks may have other decays, or want other gradients; its backward is run."""
    rank = dist.get_rank(group)
    q, k, v, constant, _ = cases.make_inputs(10, dtype=torch.float32, state=False)
    shape = 1, 10, len(constant)
    log_decay = {
        "constant": constant,
        "none": None,
        "token": by_token({}, shape),
        "positive": by_token({(0, 4, 2): 0.25}, shape),
    }[decays[rank]]
    if gradients[rank]:
        log_decay.requires_grad_()
    q, k = q.requires_grad_(), k.requires_grad_(of_keys)
    lasp.lightning_attention(q, k, v, log_decay, group=group).sum().backward()
    return log_decay.grad is not None


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("positive", r"is 0.25 at \[0, 4, 2\]: it must be <= 0"),
        ("constant", "disagree on log_decay.*one per token"),
        ("none", "disagree on log_decay.*one per token"),
    ],
)
def test_decays_that_do_not_fit_are_refused_on_every_rank(pool, rank, other, message):
    decays = ["token", "token"]
    decays[rank] = other
    outcomes = pool.outcomes(with_decays, decays, (False, False), True, size=2)
    for outcome in outcomes:
        with pytest.raises(ValueError, match=message):
            raise outcome


@pytest.mark.parametrize("gradients", [(True, False), (False, True)])
def test_ranks_agree_whether_a_decay_needs_the_exchange_of_the_backward(pool, gradients):
    decays = ["token", "token"]
    for outcome in pool.outcomes(with_decays, decays, gradients, False, size=2):
        with pytest.raises(ValueError, match="disagree on .*gradient"):
            raise outcome
    # The keys need it anyhow: then a rank may leave out the gradient of its own decay.
    assert pool.run(with_decays, decays, gradients, True, size=2) == list(gradients)


def not_a_member(group):
    q, k, v, log_decay, _ = cases.make_inputs(5, state=False)
    # What `new_group` returns to ranks that are not in it.
    lasp.lightning_attention(q, k, v, log_decay, group=dist.GroupMember.NON_GROUP_MEMBER)


def test_a_group_without_this_rank_is_refused(pool):
    (outcome,) = pool.outcomes(not_a_member, size=1)
    with pytest.raises(ValueError, match="not a member of `group`"):
        raise outcome
