"""Grouping searches: GRIDS's published values, properties against brute force, rankings, files, errors."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest

from mirage.grids import (
    DEGRADATIONS,
    CachedPerformance,
    GroupSearch,
    delta_p,
    enumerate_groupings,
    group_name,
    load_grouping,
    parse_group,
    published,
    rank_groups,
    read_performance,
    search_groups,
    write_performance,
)
from mirage.grids.groups import check_groups

C1, C2, C3, C4 = (frozenset(text.split()) for text in ("GB MB RL", "SR RI DB", "JP PO IN", "GN SP"))


def as_sets(groups):
    return {frozenset(group) for group in groups}


# --- published values


def test_published_restormer_gives_the_papers_four_groups():
    found = search_groups(DEGRADATIONS, published())
    assert found.bisection == ((6, True), (3, False), (5, True), (4, True))
    assert as_sets(found.groups) == {C1, C2, C3, C4}
    assert found.compression == pytest.approx(1 - 4 / 11)
    assert {name: round(drop, 2) for name, drop in found.drops.items()} == {
        "GB+MB+RL": 0.68, "SR+RI+DB": 0.51, "JP+PO+IN": -0.05, "GN+SP": -0.07,
    }  # fmt: skip
    assert sum(found.trainings.values()) == 0
    assert list(map(set, GroupSearch(DEGRADATIONS, published()).all_solutions(4))) == [{C1, C2, C3, C4}]


@pytest.mark.parametrize("exact", [False, True])
def test_published_partitions_by_number_of_groups(exact):
    search = GroupSearch(DEGRADATIONS, published(), exact=exact)
    feasible = search.candidates()
    assert sum(len(group) > 1 for group in feasible) == 9
    counts = Counter(len(parts) for parts in enumerate_groupings(feasible))
    assert counts == {4: 1, 5: 3, 6: 9, 7: 14, 8: 10, 9: 8, 10: 2, 11: 1}
    for m in range(1, 12):
        exactly = [len(list(enumerate_groupings(feasible, count=k))) for k in range(m + 1)]
        solutions = [frozenset(each) for each in search.all_solutions(m)]
        assert len(solutions) == len(set(solutions)) == (exactly[m] if exact else sum(exactly))
    assert search_groups(DEGRADATIONS, published(), exact=True).bisection[-1] == (4, True)


@pytest.mark.parametrize("deltas, count", [
    ((0, 0.1, 0.2, 0.3), 8), ((0.5,), 7), ((0.55, 0.6, 0.67), 6), ((0.68, 0.7, 0.8, 1.0), 4), ((6,), 1),
])  # fmt: skip
def test_published_groups_by_delta(deltas, count):
    assert [len(search_groups(DEGRADATIONS, published(), delta).groups) for delta in deltas] == [count] * len(deltas)


def test_published_losses_of_both_networks():
    def losses(network, groups):
        values = {tuple(sorted(group)): found for group, found in published(network).values.items()}
        single = {name: values[(name,)][name] for name in DEGRADATIONS}
        return [round(delta_p(group, values[tuple(sorted(group))], single), 2) for group in groups]

    everything = frozenset(DEGRADATIONS)
    assert losses("srresnet", [C1, C2, C3, C4, everything]) == [0.27, 0.22, 0.08, -0.14, 3.08]
    table_2 = {
        "SR DB": 0.43, "GN SP": -0.07, "RI RL DB": 0.56, "GB JP SP": 1.72, "RI RL DB MB": 2.14, "GB GN SP MB": 5.14,
        "SR JP RI RL DB": 1.41, "GB IN SP PO MB": 2.58, "SR JP PO": 2.53, "GB IN PO": 0.59, "SR JP IN": 2.58,
        "GB RI DB": 0.66, "JP PO GN": -0.01, "JP PO IN": -0.05, "GB MB RL": 0.68, "SR RI DB": 0.51,
    }  # fmt: skip
    assert losses("restormer", map(parse_group, table_2)) == list(table_2.values())
    assert losses("restormer", [everything]) == [5.32]


def test_published_file_has_the_papers_averages_and_not_its_misprints():
    from mirage.grids.performance import _published

    content = _published()
    assert len(published().values) == 11 + 17 and len(published("srresnet").values) == 11 + 5
    for network, averages in content["averages"].items():
        values = published(network).values
        rows = {
            "single-task": [values[frozenset([name])][name] for name in DEGRADATIONS],
            "one for all": list(values[frozenset(DEGRADATIONS)].values()),
            "GRIDS": [values[group][name] for group in (C1, C2, C3, C4) for name in group],
        }
        assert {name: round(float(np.mean(row)), 2) for name, row in rows.items()} == pytest.approx(averages, abs=0.006)
    for row in content["all_in_one"]:
        assert np.mean(list(row["psnr"].values())) == pytest.approx(row["average"], abs=0.006)
    assert published().values[C3] == {"JP": 32.23, "PO": 33.88, "IN": 32.86}  # Table 2(c) exchanges the last two
    srresnet = published("srresnet").values
    assert srresnet[C3]["JP"] - srresnet[frozenset(["JP"])]["JP"] == pytest.approx(-0.08)  # printed -0.85
    assert srresnet[C4]["SP"] - srresnet[frozenset(DEGRADATIONS)]["SP"] == pytest.approx(1.94)  # printed 1.27
    assert {frozenset(each["group"].split("+")): each["distance"] for each in content["networks"]["restormer"]
            if "distance" in each} == {
        frozenset(names.split()): distance for names, distance in {
            "SR DB": 2.75, "GN SP": 3.54, "RI RL DB": 2.20, "GB JP SP": 4.33, "RI RL DB MB": 2.52, "GB GN SP MB": 4.10,
            "SR JP RI RL DB": 2.88, "GB IN SP PO MB": 4.00, "JP PO GN": 3.49, "JP PO IN": 3.61,
        }.items()
    }  # fmt: skip


def test_largest_group_is_of_three_by_the_published_values():
    """The best pair, triple and quadruple of Table 2(a), and everything, at the heads of their lists."""
    heads = {frozenset(text.split()) for text in ("SR DB", "RI RL DB", "RI RL DB MB", "SR JP RI RL DB")}
    search = GroupSearch(DEGRADATIONS, published(), ranking=headed_by(heads))
    search.candidates()
    assert search.largest == 3
    sizes = [(step.number, step.passed) for step in search.trace if step.stage == "size"]
    assert sizes == [(6, False), (3, True), (4, False)]
    assert search.run().groups  # with all that the table lacks counted as infeasible


def headed_by(heads):
    """A ranking whose lists begin with these groups: pairs of smaller ones are alike, the others are not."""
    n = len(DEGRADATIONS)
    ranking = rank_groups(DEGRADATIONS, np.ones((n, n)))
    for group in heads:
        entries = ranking.of_size(len(group))
        ranking._lists[len(group)] = tuple(sorted(entries, key=lambda each: each.group != group))
    return ranking


# --- rankings

TOY = [
    [0, 3.325373, 4.070438, 3.799129, 2.608904],
    [3.325146, 0, 3.616129, 4.166667, 3.621996],
    [4.087180, 3.631890, 0, 4.509327, 4.212241],
    [3.853630, 4.212038, 4.524943, 0, 3.598669],
    [2.623125, 3.632674, 4.202735, 3.558487, 0],
]


@pytest.mark.parametrize("bucket, orders", [
    (0, ("04 01 34 12 14 03 02 13 24 23", "014 034 024 012 013 134 124 234 123 023", "0134 0124 0234 0123 1234")),
    (0.05, ("04 01 12 34 14 03 02 24 13 23", "014 034 024 012 124 134 013 123 234 023", "0134 0124 0234 1234 0123")),
])  # fmt: skip
def test_toy_ranking(bucket, orders):
    ranking = rank_groups(list("01234"), TOY, bucket=bucket)
    assert [" ".join("".join(each.members) for each in ranking.of_size(size)) for size in (2, 3, 4)] == list(orders)
    assert [each.members for each in ranking.of_size(1)] == [(name,) for name in "01234"]
    assert {(each.mean, each.variance) for each in ranking.of_size(1)} == {(0.0, 0.0)}


def test_toy_ranking_moments():
    ranking = rank_groups(list("01234"), TOY, bucket=0)
    pairs = [each.mean for each in ranking.of_size(2)[:5]]
    np.testing.assert_allclose(pairs, [2.616015, 3.325259, 3.578578, 3.624010, 3.627335], atol=1e-6)
    first = ranking.of_size(3)[0]
    values = [TOY[i][j] for i, j in itertools.permutations((0, 1, 4), 2)]
    assert first.mean == pytest.approx(3.189536, abs=1e-6) and first.mean == pytest.approx(np.mean(values))
    assert first.variance == pytest.approx(np.var(values))
    symmetric = rank_groups(list("01234"), TOY, bucket=0, symmetric=True)
    assert symmetric.find("04").variance == pytest.approx(0) and ranking.find("04").variance > 1e-5
    assert symmetric.find("04").mean == pytest.approx(ranking.find("04").mean)


def test_ranking_ignores_the_diagonal_and_breaks_ties_by_place():
    matrix = np.full((4, 4), 2.0)
    np.fill_diagonal(matrix, np.nan)
    ranking = rank_groups(["d", "c", "b", "a"], matrix)
    assert [each.members for each in ranking.of_size(2)] == list(itertools.combinations("dcba", 2))


def test_ranking_of_twenty_lists_large_groups():
    matrix = np.random.default_rng(0).uniform(2, 4, (14, 14))
    ranking = rank_groups([str(i) for i in range(14)], matrix)
    middle = ranking.of_size(7)
    assert len(middle) == math.comb(14, 7)
    ranks = [(round(each.mean / 0.05), each.variance) for each in middle]
    assert ranks == sorted(ranks)


# --- properties


class Counting:
    """A performance that counts what is trained: P falls by the largest similarity within a group."""

    parallel = 1

    def __init__(self, names, matrix, parallel=1):
        self.names, self.matrix, self.parallel = list(names), matrix, parallel
        self.values, self.trained = {}, Counter()

    def is_known(self, group):
        return group in self.values

    def known(self):
        return list(self.values)

    def measure(self, groups):
        for group in groups:
            if group not in self.values:
                self.trained[group] += 1
                self.values[group] = {name: 30 - self.cost(group) for name in group}
        return [self.values[group] for group in groups]

    def cost(self, group):
        """The mean similarity within the group: monotone in its rank."""
        places = [self.names.index(name) for name in group]
        pairs = [self.matrix[i, j] for i, j in itertools.permutations(places, 2)]
        return float(np.mean(pairs)) if pairs else 0.0


def every_group(names):
    return [frozenset(group) for size in range(1, len(names) + 1) for group in itertools.combinations(names, size)]


def random_matrix(n, seed):
    """Distances of points on a line: of an order that larger groups cannot escape."""
    rng = np.random.default_rng(seed)
    points = np.sort(rng.uniform(0, 2, n))
    return np.abs(points[:, None] - points[None]) + 0.01 * rng.random((n, n)) * (1 - np.eye(n))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_equals_brute_force_where_performance_follows_the_ranking(n, seed):
    names, matrix = [f"d{i}" for i in range(n)], random_matrix(n, seed)
    for delta in (0.1, 0.3, 0.6, 1.0, 2.5):
        performance = Counting(names, matrix)
        found = search_groups(names, performance, delta, rank_groups(names, matrix, bucket=0))
        feasible = [group for group in every_group(names) if performance.cost(group) <= delta]
        fewest = min(len(parts) for parts in enumerate_groupings(feasible, names))
        assert len(found.groups) == fewest
        check_groups(found.groups, names)
        assert all(performance.cost(group) <= delta + 1e-9 for group in found.groups)
        assert all(count == 1 for count in performance.trained.values())
        assert sum(found.trainings.values()) == len(performance.trained)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [6, 11])
def test_trainings_are_few_and_a_second_search_needs_none(n, seed):
    names = [f"d{i}" for i in range(n)]
    matrix = np.random.default_rng(seed).uniform(0, 2, (n, n))
    for delta in (0.4, 0.8, 1.2):
        performance, ranking = Counting(names, matrix), rank_groups(names, matrix)
        found = search_groups(names, performance, delta, ranking)
        most = math.ceil(math.log2(n))
        most += sum(math.ceil(math.log2(math.comb(n, size) + 1)) for size in range(2, found.largest + 1))
        assert found.trainings["single"] == n
        assert found.trainings["prepare"] <= most
        trained = dict(performance.trained)
        again = search_groups(names, performance, delta, ranking)
        assert again.groups == found.groups and sum(again.trainings.values()) == 0
        assert dict(performance.trained) == trained
        check_groups(found.groups, names)


@pytest.mark.parametrize("seed", range(4))
def test_larger_delta_never_needs_more_groups(seed):
    names = [f"d{i}" for i in range(6)]
    matrix = random_matrix(6, seed)
    ranking = rank_groups(names, matrix, bucket=0)
    counts = [len(search_groups(names, Counting(names, matrix), delta, ranking).groups)
              for delta in np.linspace(0, 2.2, 23)]  # fmt: skip
    assert counts == sorted(counts, reverse=True) and counts[0] > 1 and counts[-1] == 1


def test_groups_that_the_ranking_misjudges_are_verified_and_replaced():
    """The list of pairs is cut after its third; the first of it is not what its rank promises, and is done without."""
    names = list("abcd")
    matrix = np.full((4, 4), 3.0)
    for rank, (i, j) in enumerate([(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2)]):
        matrix[i, j] = matrix[j, i] = 1 + rank / 10
    costs = {frozenset("ab"): 5.0, frozenset("cd"): 0.1, frozenset("ac"): 0.1, frozenset("bd"): 0.1}

    class Misjudged(Counting):
        def cost(self, group):
            return 0.0 if len(group) == 1 else costs.get(group, 9.0)

    performance = Misjudged(names, matrix)
    found = search_groups(names, performance, 0.7, rank_groups(names, matrix))
    assert found.largest == 1 and len(found.groups) == 4  # the head of the pairs fails: pairs are given up
    costs[frozenset("ab")] = 0.1
    costs[frozenset("cd")] = 5.0
    for parallel in (1, 3):
        performance = Misjudged(names, matrix, parallel)
        found = search_groups(names, performance, 0.7, rank_groups(names, matrix))
        assert as_sets(found.groups) == {frozenset("ac"), frozenset("bd")}
        verified = {step.group: step.passed for step in found.trace if step.stage == "verify"}
        assert verified == {"c+d": False}


@pytest.mark.parametrize("parallel", [1, 4])
def test_searches_with_and_without_parallel_trainings_agree(parallel):
    names, matrix = [f"d{i}" for i in range(8)], np.random.default_rng(5).uniform(0, 2, (8, 8))
    plain = search_groups(names, Counting(names, matrix), 0.8, rank_groups(names, matrix))
    other = search_groups(names, Counting(names, matrix, parallel), 0.8, rank_groups(names, matrix))
    assert other.groups == plain.groups and other.bisection == plain.bisection


def test_exhaustive_search_of_many_overlapping_groups_ends():
    """All triples of fourteen of fifteen: that fewer than seven groups do not cover them is told without trying all."""
    names = [f"{i:02d}" for i in range(15)]
    values = {frozenset([name]): {name: 30.0} for name in names}
    values |= {frozenset(g): dict.fromkeys(g, 30.0) for g in itertools.combinations(names, 3) if names[0] not in g}
    found = search_groups(names, CachedPerformance(values))
    assert len(found.groups) == 7  # four triples; the two that are left, and the first, are alone
    assert GroupSearch(names, CachedPerformance(values)).solve(6) is None


# --- tables, files, errors


def test_missing_groups_are_infeasible_and_reported():
    values = {name: {name: 30.0} for name in "abc"} | {"a+b": {"a": 30.0, "b": 29.9}, "b+c": {"b": 30.0}}
    matrix = np.ones((3, 3))
    plain = search_groups(list("abc"), CachedPerformance(values))
    assert as_sets(plain.groups) == {frozenset("ab"), frozenset("c")}
    assert plain.missing == ("b+c",)
    assert any("5 of 7 groups are known" in note for note in plain.notes)
    ranked = search_groups(list("abc"), CachedPerformance(values), ranking=rank_groups(list("abc"), matrix))
    assert as_sets(ranked.groups) == {frozenset("ab"), frozenset("c")}
    assert "a+b+c" in ranked.missing and any("a+b+c" in note and "infeasible" in note for note in ranked.notes)
    assert all(step.drop == math.inf and not step.passed and not step.trained
               for step in ranked.trace if step.group == "a+b+c")  # fmt: skip
    del values["a"]
    alone = search_groups(list("abc"), CachedPerformance(values))
    assert len(alone.groups) == 3 and "a" in alone.missing and "a+b" not in alone.drops
    assert "performance: not known of a alone, so larger groups with it count as infeasible" in alone.notes


def test_tables_as_json_and_csv(tmp_path):
    for name in ("table.json", "table.csv"):
        write_performance(published(), tmp_path / name, DEGRADATIONS)
        again = read_performance(tmp_path / name, DEGRADATIONS)
        assert again.values == published().values
        assert [group_name(group, DEGRADATIONS) for group in again.values][:12] == [*DEGRADATIONS, "SR+DB"]
        assert as_sets(search_groups(DEGRADATIONS, again).groups) == {C1, C2, C3, C4}
    assert read_performance("published:srresnet").values == published("srresnet").values


def test_grouping_as_a_file(tmp_path):
    matrix = np.random.default_rng(0).uniform(2, 4, (11, 11))
    found = search_groups(DEGRADATIONS, published(), ranking=rank_groups(DEGRADATIONS, matrix))
    found.save(tmp_path / "deep" / "groups.json")
    again = load_grouping(tmp_path / "deep" / "groups.json")
    assert again.groups == found.groups and again.drops == found.drops and again.missing == found.missing
    steps = [[(s.stage, s.number, s.passed, s.group, s.drop) for s in each.trace if s.drop == s.drop]
             for each in (again, found)]  # fmt: skip
    assert steps[0] == steps[1] and again.bisection == found.bisection
    assert again.group_of("GB") == found.group_of("GB")


@pytest.mark.parametrize("call, sentence", [
    (lambda: search_groups("GB", published()), r"degradations: expected a sequence of names, got the text 'GB'"),
    (lambda: search_groups(["GB", "GB"], published()), r"degradations: expected different names.*\['GB', 'GB'\]"),
    (lambda: search_groups([], published()), r"degradations: expected different names"),
    (lambda: search_groups(["GB+MB", "SP"], published()), r"expected names without \+, commas.*got 'GB\+MB'"),
    (lambda: search_groups(["GB"], published(), math.nan), r"delta: expected a number of dB, got nan"),
    (lambda: search_groups(["GB", "MB"], published(), ranking=rank_groups(["GB", "SP"], np.ones((2, 2)))),
     r"ranking: expected one of GB, MB, got one of GB, SP"),
    (lambda: rank_groups([str(i) for i in range(21)], np.ones((21, 21))), r"degradations: expected at most 20.*got 21"),
    (lambda: rank_groups(["a", "b"], np.ones((3, 3))), r"matrix: expected \[2, 2\].*got \[3, 3\]"),
    (lambda: rank_groups(["a", "b"], [[0, np.nan], [1, 0]]), r"matrix: expected finite numbers, got nan at a, b"),
    (lambda: rank_groups(["a", "b"], np.ones((2, 2)), bucket=-1), r"bucket: expected 0 or a positive number, got -1"),
    (lambda: rank_groups(["a", "b"], np.ones((2, 2))).of_size(3), r"size: expected 1 to 2, got 3"),
    (lambda: parse_group("GB MB", ["GB"]), r"group: expected some of GB, got 'MB'"),
    (lambda: parse_group("GB+GB"), r"group: expected degradations, each once, such as GB\+MB\+RL, got 'GB\+GB'"),
    (lambda: parse_group(" "), r"group: expected degradations, each once"),
    (lambda: check_groups([["a"], ["a", "b"]], ["a", "b", "c"]), r"each degradation in one group, got a in 2, c in 0"),
    (lambda: check_groups([["x"]], ["a"]), r"groups: expected some of a, got 'x'"),
    (lambda: enumerate_groupings([["a", "x"]], ["a"]), r"groups: expected some of a, got 'x'"),
    (lambda: published("nafnet"), r"network: expected one of restormer, srresnet, got 'nafnet'"),
    (lambda: read_performance("published:x"), r"network: expected one of restormer, srresnet, got 'x'"),
    (lambda: CachedPerformance({"a+b": {"a": math.nan}}), r"values of a\+b: expected a finite number of dB for a"),
    (lambda: CachedPerformance({"a+b": {"c": 1.0}}), r"values of a\+b: expected some of a, b, got 'c'"),
    (lambda: CachedPerformance({"a+b": {}, ("b", "a"): {}}), r"values: a\+b comes twice"),
    (lambda: CachedPerformance({(): {}}), r"expected groups of at least one degradation"),
])  # fmt: skip
def test_what_is_wrong_is_told_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("name, text, sentence", [
    ("t.json", "{}", r"t\.json: expected a table of the format 'mirage grids performance, version 1'"),
    ("t.json", "nonsense", r"t\.json: not readable as JSON: Expecting value"),
    ("t.json", json.dumps({"format": "mirage grids performance, version 1", "groups": [{"group": "a"}]}),
     r"t\.json: groups\[0\]: expected"),
    ("t.json", json.dumps({"format": "mirage grids performance, version 1",
                           "groups": 2 * [{"group": "a", "psnr": {"a": 1}}]}), r"groups\[1\]: a comes twice"),
    ("t.json", json.dumps({"format": "mirage grids performance, version 1",
                           "groups": [{"group": "a", "psnr": {"a": "x"}}]}), r"expected a finite number of dB for a"),
    ("t.csv", "", r"t\.csv: expected the columns group, degradation, psnr, got none"),
    ("t.csv", "group,psnr\n", r"expected the columns group, degradation, psnr, got group, psnr"),
    ("t.csv", "group,degradation,psnr\na,a,\n", r"line 2: psnr: expected a number, got ''"),
    ("t.csv", "group,degradation,psnr\na,a,1\na,a,2\n", r"line 3: a of a comes twice"),
    ("t.csv", "group,degradation,psnr\na+b,a,1\nb+a,b,2\n", r"values: a\+b comes twice"),
    ("t.csv", "group,degradation,psnr\nGB,GB,inf\n", r"expected a finite number of dB for GB, got inf"),
    ("t.csv", "group,degradation,psnr\nXX,XX,1\n", r"t\.csv: degradations: expected some of GB.*, got 'XX'"),
])  # fmt: skip
def test_what_is_wrong_with_a_table_is_told_in_a_sentence(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_performance(tmp_path / name, DEGRADATIONS)


@pytest.mark.parametrize("change, sentence", [
    (lambda c: c.pop("format"), "expected a file of the format"),
    (lambda c: c["groups"].pop(), r"each degradation in one group"),
    (lambda c: c.update(more=1), "unexpected keyword argument"),
    (lambda c: c.pop("drops"), "drops"),
])  # fmt: skip
def test_what_is_wrong_with_a_grouping_is_told_in_a_sentence(tmp_path, change, sentence):
    path = tmp_path / "groups.json"
    search_groups(DEGRADATIONS, published()).save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"groups\.json: not readable as a grouping: .*{sentence}"):
        load_grouping(path)
