#!/usr/bin/env python3
"""Every failpoint is met by a job, which then ends with the right answer or an error's name.

    failpoints_test.py PROGRAM READER [--all]

Without --all each name is met with one of its actions, with it with all of them.
"""

import concurrent.futures
import os
import sys
import unittest

import failpoints
import jobs
from jobs import product

ALL = "--all" in sys.argv


class Failpoints(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.bench = jobs.Bench(sys.argv[1], sys.argv[2], extra=["--cache.scrub_steps", 1])
        cls.addClassCleanup(cls.bench.close)

    def meet(self, name, action, draw, long_sleep):
        spec, pause = failpoints.specification(name, action, draw, long_sleep, skip=0)
        return spec, jobs.run_failpoint(self.bench, name, spec, pause_s=pause,
                                        **failpoints.NEEDS.get(name, {}))

    def test_every_name_is_met_and_nothing_wrong_comes_of_it(self):
        todo = []
        for i, (name, actions) in enumerate(failpoints.table()):
            if name in failpoints.DISABLES:
                continue
            for action in actions if ALL else [actions[i % len(actions)]]:
                for long_sleep in (False, True) if ALL and action == "sleep" else (i % 2 == 0,):
                    todo.append((name, action, i, long_sleep))
        self.assertGreaterEqual(len({name for name, *_ in todo}), 40)
        with concurrent.futures.ThreadPoolExecutor(max_workers=4 * os.cpu_count()) as pool:
            found = list(pool.map(lambda one: self.meet(*one), todo))
        for spec, outcome in found:
            with self.subTest(spec):
                if "-v" in sys.argv:
                    print(f"{spec}: {outcome}")
                self.assertIn(outcome.result, (jobs.SAME, jobs.NAMED), outcome.text)
                self.assertFalse(outcome.late, f"took {outcome.seconds:.1f} s")

    def test_without_their_defence_wrong_bytes_are_served_and_seen(self):
        """The two points that take a defence away show that these jobs can fail. A flip that is
        small enough may do no harm, and the canary may see another: of eight one must."""
        for name in sorted(failpoints.DISABLES):
            found = []
            for seed in range(8):
                fault = failpoints.NEEDS[name]["helpers"] + f",seed={seed}"
                outcome = jobs.run_failpoint(self.bench, name, f"{name}=force", helpers=fault)
                found.append(outcome)
                if outcome.result == jobs.VIOLATION:
                    break
            self.assertEqual(found[-1].result, jobs.VIOLATION, f"{name}: {found}")

    def test_a_misspelt_name_ends_the_program(self):
        job = product.certkv("--version", env={"CERTKV_FAILPOINT": "holder.alocate=panic"})
        job.expect_exit(2).expect_text("holder.alocate")


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *[a for a in sys.argv[3:] if a != "--all"]])
