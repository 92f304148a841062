"""What one row's text does, wherever its tokens are cut: tags, stops and budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from midstream.rendering import cut_middle
from midstream.testing.checked_engine import ENDED, Case, CheckedEngine, under
from midstream.testing.steering import CHOICE, EOS, PERIOD, Part, Shown, ids_of, steered
from midstream.types import Limits, Sampling, StopKind, StopReason

TWO = Shown("<result>2</result>")


def tags_split_in_every_way(subject: CheckedEngine) -> None:
    starts, ends = list(_splits("<code>")), list(_splits("</code>"))
    subject.run(
        [
            Case(steered("is", *starts[place % len(starts)], "1+1", *end, TWO, " the"), name="|".join(end))
            for place, end in enumerate(ends)
        ]
    )


def what_stands_behind_an_end_tag_in_its_token(subject: CheckedEngine) -> None:
    """It is generated text: kept, scanned, and left out of a result that begins with it."""
    four = Shown("<result>4</result>")
    block: tuple[Part, ...] = ("<code>", "1+1", "</", "code")
    rows: dict[str, tuple[Part, ...]] = {
        "text": (*block, ">x", TWO, " the"),
        "a line": (*block, ">\n", TWO, " the"),
        "lines": (*block, ">\n\n", TWO, " the"),
        "the beginning of a result": (*block, "><", Shown("result>2</result>"), " the"),
        "the beginning of a tag that never comes": (*block, "><", Shown("result>2</result>"), "code>", "x"),
        "the beginning of a tag behind a silent block": (
            "<code>",
            "a=4",
            "</",
            "code",
            "><",
            "code>",
            "a",
            "</code>",
            four,
        ),
        "a start tag": ("<code>", "1+1", "</code><code>", TWO, "2+2", "</code>", four),
        "a whole block": ("<code>1", "</code><code>2</code>", Shown("<result>1</result><result>2</result>"), " the"),
        "nothing, all in one token": ("<code>1</code>", Shown("<result>1</result>"), " the"),
        "lines of a result": (
            "<code>",
            "print(",
            "1)\n2",
            "</",
            "code",
            ">\n",
            Shown("\n<result>\n1\n2\n</result>"),
            " the",
        ),
        "an end tag alone": (" the", "</code>", "is", "</", "code", ">x", "<code>", "1+1", "</code>", TWO),
        "a character in parts": ("<code>", "'é🙂'", "</code>", Shown("<result>'é🙂'</result>"), "🙂"),
    }
    subject.run([Case(steered(*parts), name=name) for name, parts in rows.items()])


def an_end_of_sequence_that_is_the_padding_too(subject: CheckedEngine) -> None:
    """Its id stands in prompts, in the middle of rows that ignore it, and ends others, in blocks too."""
    before = [(EOS,) * count for count in (0, 1, 7, 30)]
    text: tuple[Part, ...] = ("<code>", "1+1", "</code>", TWO, " the")
    cases = [Case(steered(*text, before=filler), name=f"behind {len(filler)}") for filler in before]
    inside = steered("is", "<code>", "1+1", EOS, "</code>", " the")
    cases.append(Case(inside, length=6, name="in a block"))
    if not subject.capabilities.rounds:  # rounds end there by the policy's own will
        going_on = steered("is", EOS, EOS, *text, EOS, "is", end=False)
        stop = StopReason(StopKind.LENGTH, "new_tokens")
        limits = Limits(max_new_tokens=len(going_on.ids), ignore_eos=True)
        cases.append(Case(going_on, limits, stop, name="ignored"))
    subject.run(cases)


def logprobs_are_those_of_the_sampled_ids(subject: CheckedEngine) -> None:
    """Where the model is sure they are exactly 0, and still of generated ids."""
    parts: tuple[Part, ...] = (
        "is",
        CHOICE,
        "<code>",
        "1",
        CHOICE,
        CHOICE,
        ";1+1",
        "</code>",
        TWO,
        CHOICE,
        " the",
        CHOICE,
    )
    subject.run([Case(steered(*parts, before=(EOS,) * count)) for count in range(3)], n=2)
    if not subject.capabilities.sampling:
        return
    for sampling in (Sampling(temperature=0.5), Sampling(temperature=2.0)):
        subject.run([Case(steered(*parts))], n=2, sampling=sampling)


def stop_strings_wherever_tokens_are_cut(subject: CheckedEngine) -> None:
    rows: dict[str, tuple[tuple[Part, ...], int]] = {
        "inside a token": (("is", "aSTOPb", " the"), 2),
        "across tokens": (("is", "ST", "OP", " the"), 3),
        "from one token into the next": (("is", "ST", "is", "S", "TOPx", " the"), 5),
        "in a block": (("<code>", "1", "aSTOPb", "</code>", " the"), 3),
        "behind a block in its token": (("<code>", "1+1", "</code>STOP", TWO, " the"), 5 + len(TWO.text)),
        "behind a result": (("<code>", "1+1", "</code>", TWO, "STOP", " the"), 6 + len(TWO.text)),
    }
    stopped = StopReason(StopKind.STOP_STRING, "STOP")
    cases = [
        under(Case(steered(*parts), stop=stopped, length=length, name=name), stop_strings=("STOP", "never"))
        for name, (parts, length) in rows.items()
    ]
    in_result = ("<code>", "'ST'+'OP'", "</code>", Shown("<result>'STOP'</result>"), " the")
    cases.append(under(Case(steered(*in_result), name="in a result"), stop_strings=("STOP",)))
    cases.append(Case(steered("is", "STOP", " the"), name="another row's"))
    (stop_id,) = ids_of(" the")
    by_id = StopReason(StopKind.STOP_ID, str(stop_id))
    case = Case(steered("is", "<code>", "1+1", " the", "is"), stop=by_id, length=6, name="a stop id")
    cases.append(under(case, stop_ids=(stop_id,)))
    subject.run(cases)


def budgets_at_every_boundary(subject: CheckedEngine) -> None:
    """Each count of new ids, and of all ids, from one to more than the row takes."""
    text = steered("is", "<code>", "1+1", "</", "code", ">x", TWO, " the", " and so")
    block = 8  # ids up to and with the end tag
    empty = len("<result></result>")
    whole = len(text.ids)
    cases = []
    for budget in range(1, whole + 2):
        for name in ("new_tokens", "total_tokens"):
            stop, length = StopReason(StopKind.LENGTH, name), budget
            if block < budget < block + empty:
                stop, length = StopReason(StopKind.LENGTH, "no_room_for_result"), block
            elif budget >= whole:
                stop, length = ENDED, whole
            expected = text
            if budget == block + empty:  # a result that is cut to nothing
                expected = steered("is", "<code>", "1+1", "</", "code", ">x", Shown("<result></result>"))
            limits = {"max_new_tokens": budget} if name == "new_tokens" else {"max_total_tokens": PERIOD + budget}
            cases.append(under(Case(expected, stop=stop, length=length, name=f"{budget} {name}"), **limits))
    subject.run(cases)


def budgets_of_calls_and_results(subject: CheckedEngine) -> None:
    told = Shown("<result>Not run: the limit of 1 calls is reached.</result>")
    block: tuple[Part, ...] = ("<code>", "1+1", "</code>")
    limited = Case(steered(*block, TWO, " the", *block, told, "is"), name="told of the limit of calls")
    reached = StopReason(StopKind.TOOL_CALL_LIMIT, "1")
    stopped = Case(
        steered(*block, TWO, " the", *block, "is"), stop=reached, length=11 + len(TWO.text), name="stopped at it"
    )
    most, output = 70, "x" * 100
    attempts = [f"<result>{cut_middle(output, keep)[0]}</result>" for keep in range(len(output))]
    shown = [attempt for attempt in attempts if len(attempt.encode()) <= most][-1]
    cut = Case(steered("<code>", "print(", "'x'*100)", "</code>", Shown(shown), " the"), name="cut in the middle")
    none = Case(steered(*block, "is"), stop=StopReason(StopKind.TOOL_CALL_LIMIT, "0"), length=5, name="none at all")
    subject.run(
        [
            under(limited, max_tool_calls=1),
            under(stopped, max_tool_calls=1, at_tool_call_limit="stop"),
            under(none, max_tool_calls=0, at_tool_call_limit="stop"),
            under(cut, max_result_tokens=most),
        ]
    )


def _splits(text: str) -> Iterator[tuple[str, ...]]:
    """Every way to cut a text into parts."""
    yield (text,)
    for first in range(1, len(text)):
        for rest in _splits(text[first:]):
            yield (text[:first], *rest)


TEXTS: tuple[Callable[[CheckedEngine], None], ...] = (
    tags_split_in_every_way,
    what_stands_behind_an_end_tag_in_its_token,
    an_end_of_sequence_that_is_the_padding_too,
    logprobs_are_those_of_the_sampled_ids,
    stop_strings_wherever_tokens_are_cut,
    budgets_at_every_boundary,
    budgets_of_calls_and_results,
)
