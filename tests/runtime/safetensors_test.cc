#include "runtime/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <random>

#include "kernels/base/error.h"
#include "tests/support/temp_folder.h"

namespace certkv {
namespace {

using test::TempFolder;
using testing::HasSubstr;

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    return std::string(error_kind_name(e.kind())) + ": " + e.what();
  }
  return "no error";
}

std::span<const std::byte> bytes_of(const std::string& s) {
  return {reinterpret_cast<const std::byte*>(s.data()), s.size()};
}

std::string file_of(const std::string& header, size_t data_bytes) {
  std::string file(8, '\0');
  for (size_t i = 0; i < 8; ++i) file[i] = char(uint64_t(header.size()) >> (8 * i));
  return file + header + std::string(data_bytes, '\x3c');
}

SafetensorsHeader parse(const std::string& file) {
  return parse_safetensors_header(bytes_of(file), file.size(), "x.safetensors");
}
std::string error_of_header(const std::string& header, size_t data_bytes) {
  return error_of([&] { parse(file_of(header, data_bytes)); });
}

std::string small_file() {
  return file_of(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2,3],)"
      R"("data_offsets":[0,12]},"b":{"dtype":"U8","shape":[0,7],"data_offsets":[12,12]},)"
      R"("c":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}  )",
      16);
}

TEST(Safetensors, WhatIsWrittenIsReadBackBitForBit) {
  const TempFolder folder;
  const std::vector<float> f32 = {1.5f, -0.0f, 3e38f, 1e-45f};
  const std::vector<double> f64 = {0.1, -2};
  const std::vector<uint16_t> f16 = {0x3c00, 0x8001, 0x7bff};
  const std::vector<uint8_t> u8 = {0, 255, 7};
  const std::vector<int64_t> i64 = {INT64_MIN, 5};
  const std::vector<int32_t> i32 = {-7};
  const auto path = folder / "t.safetensors";
  const std::vector<TensorToWrite> written = {
      {"f32", DType::F32, {2, 2}, f32.data()}, {"f64", DType::F64, {2}, f64.data()},
      {"f16", DType::F16, {3, 1}, f16.data()}, {"bf16", DType::BF16, {3}, f16.data()},
      {"u8", DType::U8, {3}, u8.data()},       {"i64", DType::I64, {2}, i64.data()},
      {"i32", DType::I32, {}, i32.data()},     {"none", DType::F32, {4, 0}, nullptr},
      {"none too", DType::U8, {0}, nullptr}};
  write_safetensors(path, written, {{"made by", "a \"test\""}});

  const SafetensorsFile file(path);
  EXPECT_EQ(file.header().tensors.size(), written.size());
  EXPECT_EQ(file.header().metadata.at("made by"), "a \"test\"");
  for (const TensorToWrite& w : written) {
    const TensorEntry& t = file.tensor(w.name);
    EXPECT_EQ(t.dtype, w.dtype) << w.name;
    EXPECT_EQ(t.shape, w.shape) << w.name;
    std::vector<char> back(t.bytes());
    file.read_raw(t, 0, t.elements, back.data());
    EXPECT_TRUE(back.empty() || std::memcmp(back.data(), w.data, back.size()) == 0) << w.name;
  }
  float x[3];
  file.read_float(file.tensor("f16"), 0, 3, x);
  EXPECT_EQ(x[0], 1.0f);
  EXPECT_EQ(x[1], -0x1p-24f);
  EXPECT_EQ(x[2], 65504.0f);
  file.read_float(file.tensor("bf16"), 0, 1, x);
  EXPECT_EQ(x[0], 0x1p-7f);
  // Data begins at a multiple of 8, as readers that map the file rely on.
  EXPECT_EQ(file.header().tensors.front().begin % 8, 0u);
}

TEST(Safetensors, AFileCutAtAnyByteIsAnErrorThatNamesIt) {
  const TempFolder folder;
  const std::string whole = small_file();
  EXPECT_EQ(parse(whole).tensors.size(), 3u);
  for (size_t cut = 0; cut < whole.size(); ++cut) {
    const auto path = folder.write("cut.safetensors", whole.substr(0, cut));
    const std::string e = error_of([&] { SafetensorsFile file(path); });
    EXPECT_THAT(e, HasSubstr("BadFile")) << cut;
    EXPECT_THAT(e, HasSubstr("cut.safetensors")) << cut;
  }
  EXPECT_THAT(error_of([&] { parse(whole + "x"); }), HasSubstr("extended"));
}

TEST(Safetensors, EveryMutationIsRefusedOrStaysInsideTheFile) {
  const std::string whole = small_file();
  const auto check = [](const std::string& file) {
    try {
      const SafetensorsHeader header = parse(file);
      uint64_t at = 8;
      for (const TensorEntry& t : header.tensors) {
        EXPECT_GE(t.begin, at);
        EXPECT_LE(t.bytes(), file.size());
        at = t.begin + t.bytes();
        EXPECT_LE(at, file.size());
      }
      return true;
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::BadFile);
      return false;
    }
  };
  size_t accepted = 0;
  for (size_t i = 0; i < whole.size() - 16; ++i) {
    for (const int c :
         {0, 1, 9, 34, 44, 45, 46, 48, 49, 57, 91, 93, 101, 123, 125, 127, 128, 255}) {
      std::string file = whole;
      file[i] = char(c);
      accepted += check(file);
    }
  }
  EXPECT_GT(accepted, 0u);  // other names of tensors, for instance
  std::mt19937_64 random(1);
  for (int n = 0; n < 20000; ++n) {
    std::string file = whole;
    for (int k = 0; k < 3; ++k) {
      const size_t at = random() % (file.size() - 16);
      if (random() % 3 == 0) {
        file.erase(at, 1 + random() % 4);
      } else {
        file[at] = whole[random() % whole.size()];
      }
      if (file.size() < 32) file = whole;
    }
    check(file);
  }
}

TEST(Safetensors, EveryKindOfFaultInAHeaderHasItsOwnError) {
  const auto one = [](const std::string& dtype, const std::string& shape,
                      const std::string& offsets) {
    return R"({"w":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets +
           "}}";
  };
  EXPECT_EQ(error_of_header(one(R"("F32")", "[2]", "[0,8]"), 8), "no error");
  const auto refused = [](const std::string& header, size_t data, const char* what) {
    const std::string e = error_of_header(header, data);
    EXPECT_THAT(e, HasSubstr("BadFile: ")) << header;
    EXPECT_THAT(e, HasSubstr("x.safetensors")) << header;
    EXPECT_THAT(e, HasSubstr(what)) << header;
  };
  refused(one(R"("F32")", "[3]", "[0,8]"), 8, "tensor 'w': shape [3] of F32 takes 12 bytes");
  refused(one(R"("F16")", "[2]", "[0,8]"), 8, "takes 4 bytes");
  refused(one(R"("F8_E5M2")", "[8]", "[0,8]"), 8, "tensor 'w': dtype 'F8_E5M2' is not supported");
  refused(one("7", "[2]", "[0,8]"), 8, "dtype must be a text");
  refused(one(R"("F32")", "[2]", "[8,0]"), 8, "go backwards");
  refused(one(R"("F32")", "[2]", "[0,16]"), 8, "data_offsets[1] must be");
  refused(one(R"("F32")", "[2]", "[4,12]"), 12, "hole");
  refused(one(R"("F32")", "[2]", "[0,8]"), 12, "extended");
  refused(one(R"("F32")", "[2]", "[0]"), 8, "list of two");
  refused(one(R"("F32")", "[-2]", "[0,8]"), 8, "dimension");
  refused(one(R"("F32")", "[2.0]", "[0,8]"), 8, "dimension");
  refused(one(R"("F32")", "[18446744073709551616]", "[0,8]"), 8, "dimension");
  // Products that come out right only modulo 2^64.
  refused(one(R"("U8")", "[4294967296,4294967296]", "[0,0]"), 0, "overflows");
  refused(one(R"("F32")", "[281474976710656,16384]", "[0,0]"), 0, "overflows");
  refused(one(R"("U8")", "[1,1,1,1,1,1,1,1,8]", "[0,8]"), 8, "at most 8 dimensions");
  refused(R"({"w":{"dtype":"U8","shape":[8]}})", 8, "dtype, shape and data_offsets");
  refused(R"({"w":[1]})", 8, "dtype, shape and data_offsets");
  refused(R"({"":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})", 8, "its name has 0 bytes");
  refused(R"({"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
          R"("w":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
          8, "occurs twice");
  refused(R"({"v":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},)"
          R"("w":{"dtype":"U8","shape":[5],"data_offsets":[3,8]}})",
          8, "overlaps");
  refused(R"({"v":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
          R"("w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
          4, "overlaps");
  refused(R"({"v":{"dtype":"U8","shape":[0],"data_offsets":[3,3]},)"
          R"("w":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})",
          8, "overlaps");
  refused(R"({"__metadata__":{"a":1}})", 0, "no text");
  refused(R"({"__metadata__":7})", 0, "no object");
  refused(R"({"w":{"dtype":"U8","shape":[[[[8]]]],"data_offsets":[0,8]}})", 8, "nested deeper");
  refused(" {}", 0, "does not start with");
  refused("{}x", 0, "not valid JSON");
  EXPECT_EQ(error_of_header("{}", 0), "no error");
  EXPECT_EQ(error_of_header(R"({"v":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)"
                            R"("w":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})",
                            8),
            "no error");

  std::string huge = file_of("{}", 0);
  huge[7] = '\x7f';
  EXPECT_THAT(error_of([&] { parse(huge); }), HasSubstr("is announced"));
}

TEST(Safetensors, AFileThatShrinksUnderTheReaderIsAnError) {
  const TempFolder folder;
  std::vector<float> data(10000, 1.0f);
  const auto path = folder / "t.safetensors";
  write_safetensors(path, std::vector<TensorToWrite>{{"w", DType::F32, {100, 100}, data.data()}});
  const SafetensorsFile file(path);
  const TensorEntry& t = file.tensor("w");
  std::vector<float> out(10000);
  file.read_float(t, 0, 10000, out.data());
  EXPECT_EQ(out, data);
  std::filesystem::resize_file(path, t.begin + 20000);
  for (const auto& read :
       std::vector<std::function<void()>>{[&] { file.read_float(t, 0, 10000, out.data()); },
                                          [&] { file.read_raw(t, 9999, 1, out.data()); },
                                          [&] { file.read_block(t, 0, 100, 1, 98, out.data()); }}) {
    const std::string e = error_of(read);
    EXPECT_THAT(e, HasSubstr("BadFile"));
    EXPECT_THAT(e, HasSubstr("t.safetensors: tensor 'w': the file shrank"));
  }
  EXPECT_EQ(error_of([&] { file.read_float(t, 0, 5000, out.data()); }), "no error");
}

TEST(Safetensors, ATensorOfATebibyteCostsNothingUntilItIsRead) {
  const TempFolder folder;
  const std::string header =
      R"({"w":{"dtype":"F16","shape":[524288,1048576],"data_offsets":[0,1099511627776]}})";
  const auto path = folder.write("t.safetensors", file_of(header, 0));
  std::error_code ec;
  std::filesystem::resize_file(path, 8 + header.size() + (uint64_t(1) << 40), ec);
  if (ec) GTEST_SKIP() << "this file system has no sparse files of 1 TiB";
  const SafetensorsFile file(path);
  const TensorEntry& t = file.tensor("w");
  float out[4] = {1, 1, 1, 1};
  file.read_block(t, 524286, 2, 1048574, 2, out);
  EXPECT_EQ(out[0] + out[3], 0.0f);
  EXPECT_THAT(error_of([&] { file.read_float(t, t.elements - 3, 4, out); }),
              HasSubstr("lie outside"));
  EXPECT_THAT(error_of([&] { file.read_float(t, UINT64_MAX, 4, out); }), HasSubstr("lie outside"));
}

TEST(Safetensors, ABlockOfAMatrixIsWhatIndexingTheWholeGives) {
  const TempFolder folder;
  std::mt19937 random(3);
  for (const DType type : {DType::F32, DType::F16, DType::BF16}) {
    const int64_t rows = 9, cols = 13;
    std::vector<uint16_t> bits(size_t(rows * cols));
    std::vector<float> values;
    for (uint16_t& b : bits) {
      b = uint16_t(random() % 0x7c00);
      values.push_back(float_from_16(type == DType::F32 ? DType::F16 : type, b));
    }
    const void* data = type == DType::F32 ? static_cast<const void*>(values.data()) : bits.data();
    const auto path = folder / "t.safetensors";
    write_safetensors(path, std::vector<TensorToWrite>{{"w", type, {rows, cols}, data}});
    const SafetensorsFile file(path);
    for (int64_t r = 0; r <= rows; ++r) {
      for (int64_t n = 0; n <= rows - r; n += 2) {
        for (int64_t c = 0; c <= cols; ++c) {
          const int64_t m = (cols - c) / 2 + (cols - c) % 2;
          std::vector<float> out(size_t(n * m) + 1, -7);
          file.read_block(file.tensor("w"), r, n, c, m, out.data());
          for (int64_t i = 0; i < n * m; ++i) {
            ASSERT_EQ(out[size_t(i)], values[size_t((r + i / m) * cols + c + i % m)]);
          }
          ASSERT_EQ(out.back(), -7);
        }
      }
    }
    EXPECT_THAT(error_of([&] {
                  float x;
                  file.read_block(file.tensor("w"), 8, 2, 0, 1, &x);
                }),
                HasSubstr("lie outside"));
    EXPECT_THAT(error_of([&] {
                  float x;
                  file.read_block(file.tensor("w"), -1, 1, 0, 1, &x);
                }),
                HasSubstr("lie outside"));
  }
}

TEST(Safetensors, RowsLongerThanThePieceAreReadInParts) {
  const TempFolder folder;
  const int64_t rows = 3, cols = 300000;
  std::vector<float> values(size_t(rows * cols));
  for (size_t i = 0; i < values.size(); ++i) values[i] = float(i);
  const auto path = folder / "t.safetensors";
  write_safetensors(path,
                    std::vector<TensorToWrite>{{"w", DType::F32, {rows, cols}, values.data()}});
  const SafetensorsFile file(path);
  std::vector<float> out(2 * 299000);
  file.read_block(file.tensor("w"), 1, 2, 1000, 299000, out.data());
  EXPECT_EQ(out.front(), values[size_t(cols + 1000)]);
  EXPECT_EQ(out[299000], values[size_t(2 * cols + 1000)]);
  EXPECT_EQ(out.back(), values.back());
}

TEST(Safetensors, AWriteThatFailsLeavesTheOldFileAndNothingElse) {
  const TempFolder folder;
  const std::vector<float> old_data(4, 1.0f), new_data(100000, 2.0f);
  const auto path = folder / "t.safetensors";
  write_safetensors(path, std::vector<TensorToWrite>{{"w", DType::F32, {4}, old_data.data()}});
  const std::string before = TempFolder::read(path);
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &limit), 0);
  const rlimit small{100000, limit.rlim_max};
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string e = error_of([&] {
    write_safetensors(path,
                      std::vector<TensorToWrite>{{"w", DType::F32, {100000}, new_data.data()}});
  });
  ::setrlimit(RLIMIT_FSIZE, &limit);
  ::signal(SIGXFSZ, old_handler);
  EXPECT_THAT(e, HasSubstr("IoError"));
  EXPECT_THAT(e, HasSubstr("t.safetensors: cannot be written"));
  EXPECT_EQ(TempFolder::read(path), before);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
  EXPECT_THAT(error_of([&] { write_safetensors(folder / "no/such/folder", {}); }),
              HasSubstr("IoError"));

  const float x = 0;
  const auto write = [&](std::vector<TensorToWrite> tensors) {
    return error_of([&] { write_safetensors(path, tensors); });
  };
  EXPECT_THAT(write({{"a", DType::F32, {1}, &x}, {"a", DType::F32, {1}, &x}}),
              HasSubstr("used twice"));
  EXPECT_THAT(write({{"", DType::F32, {1}, &x}}), HasSubstr("empty"));
  EXPECT_THAT(write({{"a", DType::F32, {-1}, &x}}), HasSubstr("has no size"));
  EXPECT_THAT(write({{"a", DType::F32, {1}, nullptr}}), HasSubstr("has no data"));
}

class SafetensorsFolders : public testing::Test {
 protected:
  void write_file(const std::string& name, std::vector<std::string> tensors) {
    const float x[2] = {1, 2};
    std::vector<TensorToWrite> list;
    for (const std::string& t : tensors) list.push_back({t, DType::F32, {2}, x});
    write_safetensors(folder_ / name, list);
  }
  std::string open() {
    return error_of([&] { SafetensorsFolder f(folder_.path()); });
  }
  void index(const std::string& map) {
    folder_.write("model.safetensors.index.json", R"({"weight_map": )" + map + "}");
  }
  TempFolder folder_;
};

TEST_F(SafetensorsFolders, ASingleFileNeedsNoIndex) {
  EXPECT_THAT(open(), HasSubstr("neither model.safetensors nor"));
  write_file("model.safetensors", {"a", "b"});
  const SafetensorsFolder f(folder_.path());
  EXPECT_EQ(f.tensors().size(), 2u);
  EXPECT_EQ(f.tensor("b").entry->name, "b");
  EXPECT_EQ(f.find("c").entry, nullptr);
  EXPECT_THAT(error_of([&] { f.tensor("c"); }), HasSubstr("there is no tensor 'c'"));
}

TEST_F(SafetensorsFolders, AnIndexMustNameEveryTensorsFile) {
  write_file("one.safetensors", {"a", "b"});
  write_file("two.safetensors", {"c"});
  index(R"({"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})");
  EXPECT_EQ(open(), "no error");
  EXPECT_THAT(SafetensorsFolder(folder_.path()).tensor("c").file->path(),
              HasSubstr("two.safetensors"));
  index(R"({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})");
  EXPECT_THAT(open(), HasSubstr("two.safetensors: there is no tensor 'b'"));
  index(R"({"a": "one.safetensors", "c": "two.safetensors"})");
  EXPECT_THAT(open(), HasSubstr("one.safetensors: tensor 'b' is not the one"));
  index(R"({"a": "three.safetensors"})");
  EXPECT_THAT(open(), HasSubstr("three.safetensors"));
  index(R"({"a": 7})");
  EXPECT_THAT(open(), HasSubstr("is no file name"));
  index("[]");
  EXPECT_THAT(open(), HasSubstr("weight_map must be an object"));
  // A tensor in two files: the index decides, and the other copy is an error.
  write_file("two.safetensors", {"a"});
  index(R"({"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})");
  EXPECT_THAT(open(), HasSubstr("there is no tensor 'c'"));
}

TEST_F(SafetensorsFolders, AnIndexCannotLeadOutOfTheFolder) {
  const TempFolder elsewhere;
  const float x = 1;
  write_safetensors(elsewhere / "secret.safetensors",
                    std::vector<TensorToWrite>{{"a", DType::F32, {1}, &x}});
  for (const std::string& name :
       {(elsewhere / "secret.safetensors").string(),
        "../" + elsewhere.path().filename().string() + "/secret.safetensors", std::string("."),
        std::string("..")}) {
    index(R"({"a": ")" + name + R"("})");
    EXPECT_THAT(open(), HasSubstr("BadFile")) << name;
  }
  std::filesystem::create_symlink(elsewhere / "secret.safetensors", folder_ / "link.safetensors");
  index(R"({"a": "link.safetensors"})");
  EXPECT_THAT(open(), HasSubstr("outside the model folder"));
}

}  // namespace
}  // namespace certkv
