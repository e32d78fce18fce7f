#!/usr/bin/env python3
"""Shows that every rule of check_tree.py can fail, and that a good tree passes."""

import os
import subprocess
import tempfile
import unittest

import check_tree

GOOD = {
    "CMakeLists.txt": "project(x)\n",
    "kernels/base/error.h": "#pragma once\n#include <string>\n",
    "kernels/score.h": '#pragma once\n#include "kernels/base/error.h"\n',
    "parallel/mpi_communicator.cc": '#include <mpi.h>\n#include "kernels/score.h"\n',
    "tests/kernels/score_test.cc":
        '#include "kernels/score.h"\n'
        'void same(int a) {\n  EXPECT_EQ(a, 1);\n}\n'
        'TEST(Score, IsOne) {\n  same(1);\n}\n'
        'TEST(Score, ReadsRawText) {\n  const char* t = R"({ "a": })";\n  EXPECT_TRUE(t);\n}\n',
}


class CheckTree(unittest.TestCase):
    def findings(self, changes, git=False):
        with tempfile.TemporaryDirectory(prefix="check tree ") as root:
            for path, text in {**GOOD, **changes}.items():
                if text is None:
                    continue
                full = os.path.join(root, path)
                os.makedirs(os.path.dirname(full), exist_ok=True)
                with open(full, "w", encoding="utf-8", newline="") as file:
                    file.write(text)
            if git:
                for command in (["init", "-q"], ["add", "CMakeLists.txt", "kernels"]):
                    subprocess.run(["git", "-C", root, *command], check=True, capture_output=True)
            return check_tree.check(root)

    def expect_one(self, path, text, *words):
        found = self.findings({path: text})
        self.assertEqual(len(found), 1, found)
        self.assertTrue(found[0].startswith(path + ":"), found)
        for word in words:
            self.assertIn(word, found[0])

    def test_a_good_tree_has_no_findings(self):
        self.assertEqual(self.findings({}), [])

    def test_an_upward_include_is_found(self):
        self.expect_one("kernels/base/a.cc", '\n#include "kernels/score.h"\n', ":2:", "upward")
        self.expect_one("kvstore/a.cc", '#include "runtime/engine.h"\n', "upward include: kvstore")

    def test_an_include_not_from_the_root_is_found(self):
        self.expect_one("kernels/a.cc", '#include "score.h"\n', "root of the repository")
        self.expect_one("kernels/a.cc", '#include "../kernels/score.h"\n', "root of the repository")

    def test_the_product_may_not_include_the_tests(self):
        self.expect_one("runtime/a.cc", '#include "tests/support/oracle.h"\n', "of the tests")

    def test_the_verifier_may_not_use_what_it_checks(self):
        for target in ("runtime/certify/certificate.h", "kernels/quantize.h", "runtime/audit/log.h"):
            self.expect_one("runtime/audit/check.cc", f'#include "{target}"\n', "verifier", target)
        self.assertEqual(self.findings({"runtime/audit/log.cc": '#include "kernels/quantize.h"\n',
                                        "runtime/audit/verify.cc": '#include "kernels/simd.h"\n'}), [])

    def test_network_headers_stay_in_parallel(self):
        for header in ("mpi.h", "nccl.h", "ucp/api/ucp.h"):
            self.expect_one("kvstore/a.cc", f"#include <{header}>\n", "parallel/ alone")
        self.assertEqual(self.findings({"launcher/doctor.cc": "#include <mpi.h>\n"}), [])

    def test_asio_comes_through_one_header(self):
        self.expect_one("kvstore/a.cc", "#include <boost/asio.hpp>\n", "kernels/base/asio.h")
        self.expect_one("launcher/a.cc", "#include <boost/beast.hpp>\n", "kernels/base/asio.h")
        self.assertEqual(self.findings({
            "kernels/base/asio.h": "#pragma once\n#include <utility>\n#include <boost/asio.hpp>\n",
            "launcher/a.cc": '#include "kernels/base/asio.h"\n#include <boost/beast.hpp>\n'}), [])

    def test_a_long_file_is_found(self):
        text = "// x\n" * (check_tree.MAX_LINES + 1)
        self.expect_one("kernels/a.cc", text, "601 lines")
        self.expect_one("launcher/a", "#!/usr/bin/env bash\n" + "# x\n" * 600, "601 lines")
        self.assertEqual(self.findings({"kernels/METHOD.md": "x\n" * 1000}), [])

    def test_a_new_top_level_entry_is_found(self):
        self.assertEqual(self.findings({"notes/a.txt": ""}),
                         ["notes:1: unexpected at the top level"])

    def test_only_committed_entries_count_at_the_top_level(self):
        self.assertEqual(self.findings({"my-job.txt": ""}, git=True), [])

    def test_tabs_and_trailing_whitespace_are_found(self):
        self.expect_one("kernels/a.cc", "int a;\n\tint b;\n", ":2:", "tab")
        self.expect_one("configs/a.yaml", "a: 1 \n", "trailing whitespace")
        self.expect_one("kernels/a.cc", "int a;\r\n", "carriage return")
        self.expect_one("kernels/a.cc", "int a;", "no newline")
        self.assertEqual(self.findings({"tests/golden/a.md": "a \n"}), [])

    def test_a_header_without_pragma_once_is_found(self):
        self.expect_one("kernels/a.h", "int a();\n", "#pragma once")
        self.expect_one("kernels/cuda/a.cuh", "// #pragma once\n", "#pragma once")

    def test_machine_paths_and_registries_are_found(self):
        self.expect_one("kernels/a.cc", "// see /" + "work/main\n", "one machine")
        self.expect_one("README.md", "cd /" + "home/someone\n", "one machine")
        self.expect_one("README.md", "https://pypi.mir" + "ror.example.org/x\n", "registry")
        self.expect_one("README.md", "see ../" + "shared/method.md\n", "outside the repository")
        self.assertEqual(self.findings({"README.md": "compute/work, https://arxiv.org/abs/1\n"}), [])

    def test_a_test_without_an_assertion_is_found(self):
        for body in ("score();", "EXPECT_TRUE(true);", "SUCCEED();", '// EXPECT_EQ(1, 2);',
                     'log("EXPECT_EQ(1, 2)");', 'log(R"(EXPECT_EQ(1, 2))");'):
            self.expect_one("tests/kernels/a_test.cc", f"TEST(A, B) {{\n  {body}\n}}\n", "A.B")
        self.assertEqual(self.findings(
            {"tests/a_test.cc": "TEST_P(A, B) {\n  for (;;) {\n    ASSERT_LT(1, 2);\n  }\n}\n"}), [])

    def test_a_python_test_without_an_assertion_is_found(self):
        self.expect_one("tests/a_test.py", "def test_a():\n    print(1)\n", ":1:", "test_a")
        self.assertEqual(self.findings({"tests/a_test.py": "def test_a():\n    assert 1 + 1 == 2\n"}),
                         [])

    def test_the_command_exits_with_one_on_a_finding(self):
        with tempfile.TemporaryDirectory() as root:
            os.mkdir(os.path.join(root, "kernels"))
            with open(os.path.join(root, "kernels/a.h"), "w", encoding="utf-8") as file:
                file.write("int a();\n")
            command = [os.path.join(os.path.dirname(os.path.abspath(__file__)), "check_tree.py"), root]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("kernels/a.h:1: #pragma once is missing", done.stdout)


if __name__ == "__main__":
    unittest.main()
