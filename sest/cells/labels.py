"""What a label of the perturbation column is taken for: the control, a perturbation, or nothing.

A perturbation is a set of targets: A+ctrl is A, and B+A is A+B. Guides of the control are the control. Cells of no
known perturbation are left out. Whatever is decided is said, and `--labels as-is` takes every label as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sest.cells.treatments import treatments_of
from sest.errors import InputError, nearest, shown

AUTO, AS_IS = "auto", "as-is"
CONTROL, PERTURBATION, UNASSIGNED = "control", "perturbation", "unassigned"
# Conventional control labels by family, without case and punctuation. Guides of one family are one control; those that
# cut, or do something else to a cell, are of another.
FAMILIES = {
    word: family
    for family, words in {
        "non-targeting": "nontargeting nontargetingcontrol control ctrl nt ntc negativecontrol negctrl scramble "
        "scrambled",
        "safe-targeting": "safetargeting",
        "vehicle": "vehicle dmso dmsotf",
        "untreated": "unperturbed mock untreated",
    }.items()
    for word in words.split()
}
NO_PERTURBATION = frozenset(
    "unassigned notassigned unknown undetermined undefined multiplet doublet multiple ambiguous none na nan null "
    "unmapped noguide noguides nosgrna nogrna nofeaturecall".split()
)
NOT_LABELS = frozenset(("", "nan", "NaN", "<NA>"))  # what a missing value becomes when a column is turned into text
_GUIDE = re.compile(
    r"(?:sg|grna)?[\s_.#-]*([a-z][a-z\s_.-]*?)[\s_.#-]*(?:sg|s?grna|guide)?[\s_.#-]*\d+(?:[\s_.-]\d+)*", re.I
)
_PART = re.compile(r"[\w.:/ -]*\w[\w.:/ -]*")  # what stands for one target: no brackets, as in (+)-JQ1


class NoControlError(InputError):
    """No cell of a file has the control's label."""


@dataclass(frozen=True)
class Decision:
    """What one label is taken for."""

    label: str  # as in the file; "" where it has none
    n_cells: int
    kind: str  # control, perturbation or unassigned
    name: str | None  # the control's or the perturbation's; None for cells that are left out
    why: str  # "" where the label is its own name


@dataclass(frozen=True)
class DecidedLabels:
    """What all labels of a file are taken for."""

    control: str
    decisions: tuple[Decision, ...]
    absent: tuple[str, ...] = ()  # given as controls, beside others, and no cell has them

    @property
    def names(self) -> dict[str, str | None]:
        """Label -> the control's or the perturbation's name; None: its cells are left out."""
        return {decision.label: decision.name for decision in self.decisions}

    def of(self, kind: str) -> list[Decision]:
        """The decisions of a kind, most cells first."""
        return sorted((d for d in self.decisions if d.kind == kind), key=lambda d: (-d.n_cells, d.label))

    def unassigned(self) -> str:
        """Which labels are of no perturbation, with their cells."""
        return _counted(self.of(UNASSIGNED))

    @property
    def n_unassigned(self) -> int:
        return sum(decision.n_cells for decision in self.of(UNASSIGNED))

    def notes(self, detected: bool) -> list[str]:
        """What was decided and not given, one sentence each; `detected`: the control was."""
        n_cells = sum(decision.n_cells for decision in self.decisions)
        controls, pooled, dropped = self.of(CONTROL), [d for d in self.of(CONTROL) if d.why], self.of(UNASSIGNED)
        merged = [d for d in self.of(PERTURBATION) if d.why]
        notes = [f"No cell has the label {name!r}, given as control." for name in self.absent]
        if detected or pooled:
            notes.append(f"The control is {self.control!r} ({sum(d.n_cells for d in controls)} of {n_cells} cells).")
        if pooled:
            n = sum(d.n_cells for d in pooled)
            notes.append(f"Taken for the control too: {n:,} cells of {len(pooled)} labels: {_counted(pooled)}.")
        if merged:
            notes.append(f"A perturbation is a set of targets: {shown(f'{d.label!r} is {d.name!r}' for d in merged)}.")
        if dropped:
            notes.append(
                f"{self.n_unassigned:,} of {n_cells:,} cells are left out, as no perturbation is known: "
                f"{self.unassigned()}."
            )
        if pooled or merged or dropped:
            notes[-1] += " --labels as-is takes every label as it stands."
        return notes


def targets_of(name: str, genes: Collection[str] = ()) -> tuple[str, ...]:
    """The targets of a perturbation in the order of its name, without controls beside them; () for controls alone.

    Args:
        genes: names that are targets whatever they look like.
    """
    parts = _parts(name, genes)
    if len(parts) == 1:
        return parts
    return tuple(dict.fromkeys(part for part in parts if part in genes or not is_usual_control(part)))


def _parts(name: str, genes: Collection[str]) -> tuple[str, ...]:
    """What stands between "+" in a label; all of it where that are no targets."""
    parts = tuple(part.strip() for part in name.split("+"))
    return (name.strip(),) if name in genes or not all(_PART.fullmatch(part) for part in parts) else parts


def same_targets(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Each name as it is spelled among the `known` names, where one of them has the same targets: B+A as A+B."""
    spelling = {frozenset(targets_of(name)): name for name in reversed(list(known))}
    there = set(spelling.values())
    return {name: name if name in there else spelling.get(frozenset(targets_of(name)), name) for name in names}


def is_usual_control(label: str) -> bool:
    """Whether a label is a conventional name of controls, whatever its case, punctuation and dose."""
    return _plain(label) in FAMILIES or bool(
        (drugs := treatments_of(label)) and all(_plain(t.drug) in FAMILIES for t in drugs)
    )


def decide(
    counts: Mapping[str, int], given: Sequence[str], *, column: str, rule: str = AUTO, genes: Collection[str] = ()
) -> DecidedLabels:
    """Decide what every label of a column is.

    Args:
        counts: label -> cells; "" for cells that have none.
        given: labels of controls, and patterns such as non-targeting*; () to find the control.
        column: what errors call it.
        rule: "auto", or "as-is": every label stands for itself.
        genes: names of the file's genes, which are never guides or control words, nor what a pattern means.

    Raises:
        InputError: no label, several kinds of controls and none given, or labels that differ in case or spaces alone.
        NoControlError: no cell is a control.
    """
    if rule == AS_IS and (n := sum(number for label, number in counts.items() if label.strip() in NOT_LABELS)):
        raise InputError(
            f"Column {column!r} of obs has no label for {n} of {sum(counts.values())} cells. Fill them in, remove "
            "these cells, or leave out --labels as-is."
        )
    labels = {label: n for label, n in counts.items() if label.strip() not in NOT_LABELS}
    unlabelled = sum(counts.values()) - sum(labels.values())
    control, controls = _controls(labels, given, column, rule, genes, unlabelled)
    if rule == AS_IS:
        return DecidedLabels(control, tuple(_as_it_stands(label, n, control) for label, n in labels.items()))
    separated = _underscored(labels, controls, genes)
    decisions: list[Decision] = []
    spellings: dict[frozenset[str], list[tuple[str, int, str]]] = {}
    for label, n in counts.items():
        if label in controls:
            decisions.append(Decision(label, n, CONTROL, control, controls[label]))
        elif label.strip() in NOT_LABELS or (_plain(label) in NO_PERTURBATION and label not in genes):
            decisions.append(Decision(label, n, UNASSIGNED, None, "no perturbation"))
        else:
            parts = targets_of(separated.get(label, label), genes)
            targets = [part for part in parts if part not in controls]
            if not targets:
                decisions.append(Decision(label, n, CONTROL, control, "controls alone"))
                continue
            spellings.setdefault(frozenset(targets), []).append((label, n, "+".join(targets)))
    for same in spellings.values():
        name = max(same, key=lambda one: (one[1], one[2]))[2]
        decisions += [
            Decision(label, n, PERTURBATION, name, "" if label == name else "the same targets") for label, n, _ in same
        ]
    _refuse_twins(decisions, column)
    absent = tuple(name for name in given if not _matching(name, counts))
    return DecidedLabels(control, tuple(sorted(decisions, key=lambda d: d.label)), absent)


def _controls(
    labels: Mapping[str, int], given: Sequence[str], column: str, rule: str, genes: Collection[str], unlabelled: int
) -> tuple[str, dict[str, str]]:
    """The control's name, and label -> why it is the control ("" for the name itself).

    With the labels stand the parts of combinations that are guides of the control, as NT-3 in A+NT-3.
    """
    likely = sorted(labels, key=lambda name: (not _looks_like_control(name), -labels[name], name))
    frequent = f"Labels in {column!r} (cells): {shown(f'{name!r} ({labels[name]})' for name in likely)}. " + (
        f"{unlabelled} cells have no label: give them one if they are the controls, or pass --control."
        if unlabelled
        else "Pass --control."
    )
    parts = {part for label in labels if "+" in label and rule != AS_IS for part in _parts(label, genes)}
    others = [name for name in dict.fromkeys((*labels, *sorted(parts))) if name not in genes]  # what may be a guide
    if given:
        found = _given(labels, given, frequent, genes)
        usual = [name for name in found if is_usual_control(name)]
        control = next((name for name in (*given, *usual) if name in labels), "") or _stem(found, labels)
        family = None if control[-1:].isdigit() or rule == AS_IS else control
        if rule == AS_IS and len(found) > 1:
            raise InputError(
                "--labels as-is keeps labels apart, so that one of them is the control. Pass one --control."
            )
        meant = {name for one in given for name in _matching(one, parts) if name in others}
        alike = _guides(others, found)
        guides = [name for name in others if name in meant or (family and _is_guide_of(name, family, alike))]
        why = {name: "" if name == control else "given as control" for name in found}
        return control, dict.fromkeys(guides, "guide of the control") | why
    exact = [name for name in labels if is_usual_control(name)]
    exact = [name for name in exact if name not in genes] or exact  # CTRL is a gene
    alike = [] if rule == AS_IS else _guides([name for name in others if name not in exact], exact)
    guides = [name for name in alike if name in labels]
    families = {_family(name) for name in exact} | {_guide_family(name) for name in guides}
    if not families:
        raise NoControlError(f"No control cells: no label is a usual name for them. {frequent}")
    if len(exact) > 1 or len(families) > 1:
        both = shown(f"{name!r} ({labels[name]})" for name in [*exact, *guides])
        raise InputError(
            f"Several labels in {column!r} may be the control (cells): {both}. Choose with --control, which may be "
            "given several times."
        )
    control = exact[0] if exact else _stem(guides, labels)
    guides = [name for name in alike if _guide_family(name) in families]
    return control, dict.fromkeys(exact, "") | dict.fromkeys(guides, "guide of the control")


def _guides(names: Sequence[str], exact: Sequence[str]) -> list[str]:
    """Those of the names that are guides of controls. One NT-3 is a ligand, but not where NT, or NT-2 too, is there."""
    guides = [name for name in names if _guide_family(name)]
    short = [name for name in guides if len(re.sub(r"[^a-z]", "", name.lower())) < 4]
    like_it = [name for name in guides if name not in short and short and short[0] in name]  # NT-3+NT-3
    lonely = len(short) == 1 and not like_it and not any(len(_plain(name)) < 4 for name in exact)
    return [name for name in guides if not (lonely and name in short)]


def _given(labels: Mapping[str, int], given: Sequence[str], frequent: str, genes: Collection[str]) -> list[str]:
    """The labels that the given names and patterns mean; a pattern means no measured gene."""
    found: list[str] = []
    for name in given:
        meant = _matching(name, labels)
        fitting = [one for one in meant if one.strip() != name.strip()]  # which fit it as a pattern
        if measured := [one for one in fitting if any(part in genes for part in _parts(one, ()))]:
            raise InputError(_takes_genes(name, measured, [one for one in fitting if one not in measured]))
        found += meant
    if not found:
        raise NoControlError(
            f"No control cells: no cell has the label {shown(map(repr, given))}.{nearest(given[0], labels)} {frequent}"
        )
    return list(dict.fromkeys(found))


def _takes_genes(pattern: str, measured: Sequence[str], others: Sequence[str]) -> str:
    """What is wrong with a pattern of controls that takes measured genes for controls, and which would not."""
    narrow = sorted({re.sub(r"\d.*", "", name) + "*" for name in others})
    fits = not any(_fits(name, one) for name in measured for one in narrow)
    given = " ".join(f"--control {one!r}" for one in (narrow if fits else others)[:8])
    return (
        f"--control {pattern!r} also takes measured genes for controls: {shown(map(repr, measured))}. "
        f"Give the controls alone{f': {given}' if others else ''}."
    )


def _matching(name: str, labels: Iterable[str]) -> list[str]:
    """The labels that a given one means: itself, itself but for spaces around it, or those that fit it as a pattern."""
    there = list(labels)
    exact = [name] if name in there else [label for label in there if label.strip() == name.strip()]
    return exact or [label for label in there if label and _fits(label, name)]


def _fits(label: str, pattern: str) -> bool:
    """Whether a label, or every part of a combination, fits a pattern: NT-1+TP53 does not fit NT-*."""
    parts = (label,) if "+" in pattern else _parts(label, ())
    return fnmatchcase(label, pattern) and all(fnmatchcase(part, pattern) for part in parts)


def _underscored(labels: Iterable[str], controls: Collection[str], genes: Collection[str]) -> dict[str, str]:
    """Label -> the same with "+", where the labels are pairs with "_" between: A_ctrl and ctrl_B beside A_B.

    That is so where at least two have a control on one side; then a pair is split if both sides are targets of such.
    """
    pairs = {label: tuple(label.split("_")) for label in labels if label.count("_") == 1 and label not in controls}

    def is_control(part: str) -> bool:
        return part not in genes and (part in controls or is_usual_control(part) or bool(_guide_family(part)))

    single = {a if is_control(b) else b for a, b in pairs.values() if is_control(a) != is_control(b)}
    with_control = [pair for pair in pairs.values() if is_control(pair[0]) != is_control(pair[1])]
    if len(with_control) < 2:
        return {}
    return {
        label: "+".join("ctrl" if is_control(part) else part for part in pair)
        for label, pair in pairs.items()
        if all(is_control(part) or part in single or part in genes for part in pair)
    }


def _refuse_twins(decisions: Sequence[Decision], column: str) -> None:
    """Raise InputError for perturbations that differ in case or spaces alone."""
    spelled = [
        (str(d.name), d.label if d.label.strip() != d.label else str(d.name), "")
        for d in decisions
        if d.kind == PERTURBATION
    ]
    _refuse_alike(spelled, f"Labels in {column!r}")


def refuse_twins_between(files: Mapping[str, Iterable[str]]) -> None:
    """Raise InputError for perturbations that differ in case or spaces alone, of files by name, without controls."""
    spelled = [(name, "+".join(sorted(targets_of(name))), f" ({file})") for file in files for name in files[file]]
    _refuse_alike(spelled, "Perturbations of several files")


def _refuse_alike(names: Iterable[tuple[str, str, str]], what: str) -> None:
    """Refuse names that have several spellings: (name, spelling, where it is)."""
    alike: dict[str, dict[str, str]] = {}
    for name, spelling, where in names:
        key = "+".join(sorted(" ".join(part.split()).casefold() for part in targets_of(name)))
        alike.setdefault(key, {}).setdefault(spelling, f"{spelling!r}{where}")
    twins = [tuple(same.values()) for same in alike.values() if len(same) > 1]
    if twins:
        said = "; ".join(" and ".join(same) for same in twins[:5])
        raise InputError(
            f"{what} that differ in case or spaces alone ({len(twins)}): {said}. Make them one, or keep "
            "them apart with --labels as-is."
        )


def _as_it_stands(label: str, n: int, control: str) -> Decision:
    kind = CONTROL if label == control else PERTURBATION
    return Decision(label, n, kind, label, "")


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _family(label: str) -> str:
    """The family of a conventional control label."""
    drugs = treatments_of(label)
    return FAMILIES[_plain(label)] if _plain(label) in FAMILIES else FAMILIES[_plain(drugs[0].drug)]


def _guide_family(label: str) -> str | None:
    """The family of a guide such as non-targeting_00031, NegCtrl0, sgNTC-3 or NegCtrl0_NegCtrl0; None of others."""
    for separator in ("|", "__", "_", "+", ";"):
        parts = label.split(separator)
        if len(parts) > 1 and len({_one_guide(part) for part in parts}) == 1 and _one_guide(parts[0]):
            return _one_guide(parts[0])
    return _one_guide(label)


def _one_guide(label: str) -> str | None:
    found = _GUIDE.fullmatch(label.strip())
    return FAMILIES.get(_plain(found[1])) if found else None


def _is_guide_of(label: str, control: str, guides: Collection[str]) -> bool:
    """Whether a label is the control's name and a number behind it, or one of the usual `guides` of its family."""
    rest = label[len(control) :]
    if label.startswith(control) and re.fullmatch(r"[\s_.#-]*(sg|s?grna|guide)?[\s_.#-]*\d+", rest, re.I):
        return True
    return label in guides and is_usual_control(control) and _guide_family(label) == _family(control)


def _looks_like_control(label: str) -> bool:
    text = _plain(label)
    return any(word in text for word in FAMILIES if len(word) > 3)


def _stem(names: Sequence[str], labels: Mapping[str, int]) -> str:
    """What the labels are called without their numbers; of several, that of most cells. A label's own name if alone."""
    if len(names) == 1:
        return names[0]
    stems: dict[str, int] = {}
    for name in names:
        stem = re.sub(r"[\s_.#|-]*\d.*$", "", name) or name
        stems[stem] = stems.get(stem, 0) + labels[name]
    return max(stems, key=lambda stem: (stems[stem], stem))


def _counted(decisions: Sequence[Decision]) -> str:
    return shown(f"{decision.label!r} ({decision.n_cells:,})" for decision in decisions)
