#!/usr/bin/env python3
"""A running job shows its figures over HTTP (http.listen), and answers as it would without."""

import json
import re
import socket
import unittest
import urllib.error
import urllib.request

import harness
import product


def fetch(url):
    """Status and text of an answer; None where nobody answers any more."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (urllib.error.URLError, OSError):
        return None, ""


class Status(unittest.TestCase):
    def setUp(self):
        self.temporary = harness.temporary_folder()
        self.folder = self.temporary.name
        self.addCleanup(self.temporary.cleanup)
        product.write_lines(f"{self.folder}/batch.jsonl",
                            [{"prompt": "The sky is blue. " * (8 + i) + "The sky is", "max_tokens": 24}
                             for i in range(12)])

    def test_a_job_shows_its_figures_and_gives_the_same_answers(self):
        for ranks in (0, 2):
            name = f"shown-{ranks}"
            job = product.start(*product.job_arguments(self.folder, name, "--http.listen", "127.0.0.1:0"),
                                ranks=ranks)
            self.addCleanup(job.kill)
            address = re.compile(r"http: status at (http://127\.0\.0\.1:\d+/)")
            job.wait_for(lambda: address.search(job.stderr), 60, "the address of the status")
            url = address.search(job.stderr).group(1)
            seen, ready = [], set()
            while True:
                ready.add(fetch(url + "readyz")[0])
                status, text = fetch(url + "v1/status")
                if status is None:
                    break
                self.assertEqual(status, 200, text)
                seen.append(json.loads(text))
                status, text = fetch(url + "metrics")
                if status is not None:
                    self.assertIn("certkv:num_requests_running ", text)
            job.wait(60)
            job.expect_exit(0).expect_nothing_left()
            self.assertIn(200, ready)
            finished = [s["job"]["finished"] for s in seen]
            self.assertEqual(finished, sorted(finished))
            under_way = [s for s in seen if s["job"]["steps"] > 0]
            self.assertTrue(under_way, f"no step was seen in {len(seen)} answers")
            last = under_way[-1]
            self.assertEqual(last["job"]["lines"], 12)
            self.assertEqual(last["name"], f"rank 0 of {max(1, ranks)}")
            self.assertEqual(sum(last["job"]["rungs"]), sum(last["job"]["outcomes"].values()))
            arena = next(m for m in last["memory"] if m["name"] == "arena")
            self.assertGreater(arena["total_bytes"], 0)
            self.assertLessEqual(arena["used_bytes"], arena["total_bytes"])
        product.run_job(self.folder, "silent").expect_exit(0)
        self.assertEqual(product.texts(self.folder, "shown-0", "results.jsonl"),
                         product.texts(self.folder, "silent", "results.jsonl"))

    def test_an_address_that_is_taken_is_named(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            job = product.run_job(self.folder, "taken", "--http.listen", address)
        job.expect_exit(2).expect_text(f"http.listen {address}: cannot listen there").expect_nothing_left()


if __name__ == "__main__":
    product.main()
