#include "runtime/json_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"

namespace certkv {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

template <typename F>
std::string refusal(F&& call, ErrorKind kind = ErrorKind::BadFile) {
  try {
    call();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), kind) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "was accepted";
  return "";
}

std::string nested(size_t depth) {
  return std::string(depth, '[') + std::string(depth, ']');
}

struct Folder {
  fs::path path;
  Folder() {
    std::string name = (fs::temp_directory_path() / "certkv_json_XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path = name;
  }
  ~Folder() { fs::remove_all(path); }
  void write(const fs::path& name, std::string_view text) const {
    fs::create_directories((path / name).parent_path());
    std::ofstream(path / name, std::ios::binary) << text;
  }
};

TEST(JsonFile, AnOrdinaryDocumentIsTheSameAsTheParsersOwn) {
  const std::string text =
      R"({"a":[1,-2,3.5,true,null,{"b":"\u00e9\ud83d\ude00"}],"c":{},"d":[],"e":18446744073709551615})";
  EXPECT_EQ(parse_json(text, "t"), nlohmann::json::parse(text));
  EXPECT_EQ(parse_json(" 7 ", "t"), 7);
}

TEST(JsonFile, DepthIsRefusedOneBeyondTheLimit) {
  EXPECT_NO_THROW(parse_json(nested(64), "t"));
  EXPECT_THAT(refusal([] { parse_json(nested(65), "t"); }), HasSubstr("deeper than 64"));
  EXPECT_THAT(refusal([] { parse_json(std::string(1000000, '['), "t"); }), HasSubstr("deeper"));
  std::string objects;
  for (int i = 0; i < 65; ++i) objects += "{\"a\":";
  EXPECT_THAT(refusal([&] { parse_json(objects, "t"); }), HasSubstr("deeper"));
}

TEST(JsonFile, BytesAndValuesAreRefusedBeyondTheirLimits) {
  EXPECT_THAT(refusal([] { parse_json("[1,2]", "t", {.max_bytes = 4}); }), HasSubstr("5 bytes"));
  EXPECT_NO_THROW(parse_json("[1,2]", "t", {.max_values = 3}));
  EXPECT_THAT(refusal([] { parse_json("[1,2]", "t", {.max_values = 2}); }), HasSubstr("values"));
}

TEST(JsonFile, EqualKeysAreRefused) {
  EXPECT_THAT(refusal([] { parse_json(R"({"a":1,"b":2,"a":1})", "t"); }), HasSubstr("'a' occurs"));
  EXPECT_NO_THROW(parse_json(R"({"a":{"a":{"a":1}}})", "t"));
}

TEST(JsonFile, WhatIsNotJsonIsRefused) {
  for (const char* text : {"", " ", "{", "[1,]", "{\"a\" 1}", "nul", "[1] x", "\"\xff\"",
                           "\"\xc3\"", "\"\\ud800\"", "'a'", "NaN", "[1e999]", "// c\n1"}) {
    EXPECT_THAT(refusal([&] { parse_json(text, "the-name"); }), HasSubstr("the-name")) << text;
  }
}

TEST(JsonFile, EveryTruncationIsRefused) {
  const std::string text = R"({"a":[1,{"b":"\u00e9x"},null],"c":-1.5e3})";
  for (size_t n = 0; n < text.size(); ++n) {
    refusal([&] { parse_json(std::string_view(text).substr(0, n), "t"); });
  }
}

TEST(JsonFile, FilesAreReadOnlyWhenRegularAndSmallEnough) {
  Folder f;
  f.write("a.json", "[1]");
  EXPECT_EQ(load_json_file((f.path / "a.json").string()), nlohmann::json::parse("[1]"));
  EXPECT_THAT(refusal([&] { load_json_file((f.path / "a.json").string(), {.max_bytes = 2}); }),
              HasSubstr("3 bytes"));
  EXPECT_THAT(refusal([&] { load_json_file((f.path / "none.json").string()); }),
              HasSubstr("none.json"));
  EXPECT_THAT(refusal([&] { load_json_file(f.path.string()); }), HasSubstr("not a regular file"));
  ASSERT_EQ(::mkfifo((f.path / "pipe").c_str(), 0600), 0);
  EXPECT_THAT(refusal([&] { load_json_file((f.path / "pipe").string()); }),
              HasSubstr("not a regular file"));
}

TEST(JsonFile, NoNameLeadsOutsideTheFolder) {
  Folder f;
  f.write("secret", "x");
  f.write("model/a.json", "1");
  const std::string model = (f.path / "model").string();
  EXPECT_EQ(path_in_folder(model, "a.json"), fs::canonical(f.path / "model/a.json").string());
  for (const char* name : {"../secret", "..", ".", "", "/etc/passwd", "sub/a.json", "..\\secret"}) {
    EXPECT_THAT(refusal([&] { path_in_folder(model, name); }), HasSubstr("plain file name"));
  }
  refusal([&] { path_in_folder(model, std::string_view("a.json\0x", 8)); });
  refusal([&] { path_in_folder(model, "missing"); });
  refusal([&] { path_in_folder((f.path / "no").string(), "a"); }, ErrorKind::InvalidArgument);
  fs::create_symlink("../secret", f.path / "model/link");
  EXPECT_THAT(refusal([&] { path_in_folder(model, "link"); }), HasSubstr("outside"));
  fs::create_symlink("a.json", f.path / "model/inner");
  EXPECT_EQ(path_in_folder(model, "inner"), path_in_folder(model, "a.json"));
  EXPECT_TRUE(folder_has(model, "a.json"));
  EXPECT_FALSE(folder_has(model, "b.json"));
}

TEST(JsonFile, LinksOfTheHuggingFaceCacheAreFollowedToTheirOwnBlobsOnly) {
  Folder f;
  f.write("models--a/blobs/00ff", "1");
  f.write("models--b/blobs/00ff", "1");
  const fs::path snapshot = f.path / "models--a/snapshots/rev";
  fs::create_directories(snapshot);
  fs::create_symlink("../../blobs/00ff", snapshot / "good");
  fs::create_symlink("../../../models--b/blobs/00ff", snapshot / "bad");
  EXPECT_NO_THROW(path_in_folder(snapshot.string(), "good"));
  refusal([&] { path_in_folder(snapshot.string(), "bad"); });
}

TEST(JsonFile, MembersAreCheckedForPresenceTypeAndRange) {
  const auto j = parse_json(
      R"({"n":5,"big":18446744073709551615,"neg":-1,"f":1.0,"s":"x","t":true,"z":null})", "t");
  EXPECT_EQ(json_integer(j, "n", 0, 5, "t"), 5);
  refusal([&] { json_integer(j, "n", 0, 4, "t"); });
  refusal([&] { json_integer(j, "big", 0, INT64_MAX, "t"); });
  refusal([&] { json_integer(j, "neg", 0, 10, "t"); });
  refusal([&] { json_integer(j, "f", 0, 10, "t"); });
  refusal([&] { json_integer(j, "t", 0, 10, "t"); });
  EXPECT_THAT(refusal([&] { json_integer(j, "q", 0, 10, "t"); }), HasSubstr("'q' is missing"));
  EXPECT_EQ(json_string(j, "s", "t"), "x");
  refusal([&] { json_string(j, "n", "t"); });
  EXPECT_TRUE(json_bool_or(j, "t", false, "t"));
  EXPECT_TRUE(json_bool_or(j, "z", true, "t"));
  EXPECT_FALSE(json_bool_or(j, "q", false, "t"));
  refusal([&] { json_bool_or(j, "n", false, "t"); });
}

}  // namespace
}  // namespace certkv
