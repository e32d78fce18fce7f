#include "runtime/demo_batch.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

#include "kernels/base/error.h"
#include "runtime/json_file.h"
#include "runtime/output_file.h"

namespace certkv {
namespace {

namespace fs = std::filesystem;

// The words of the reader model's training.
constexpr std::array kAdjectives = {"violet",  "amber",   "silent", "crimson", "hollow", "gentle",
                                    "frozen",  "golden",  "rusty",  "quiet",   "bitter", "polished",
                                    "ancient", "narrow",  "clever", "distant", "gloomy", "honest",
                                    "marble",  "scarlet", "tender", "velvet",  "wooden", "yellow",
                                    "brisk",   "copper",  "dusty",  "eager",   "fierce", "grand"};
constexpr std::array kNouns = {"otter",   "lantern", "harbor", "falcon",  "meadow", "cipher",
                               "orchard", "compass", "bridge", "violin",  "kettle", "anchor",
                               "candle",  "temple",  "garden", "walnut",  "mirror", "saddle",
                               "thimble", "beacon",  "parcel", "ribbon",  "quarry", "badger",
                               "marmot",  "sparrow", "ladder", "curtain", "barrel", "cottage"};
constexpr std::array kNames = {"Alice", "Boris",  "Clara",   "Dmitri", "Edith", "Felix", "Greta",
                               "Henry", "Irene",  "Jasper",  "Karin",  "Louis", "Mabel", "Nolan",
                               "Olive", "Peter",  "Quentin", "Rosa",   "Simon", "Thora", "Ulric",
                               "Vera",  "Walter", "Xenia",   "Yorick", "Zelda"};
constexpr std::array kCities = {"Zurich", "Lisbon", "Oslo",  "Cairo",  "Lima",   "Quebec", "Turin",
                                "Dakar",  "Hanoi",  "Perth", "Kyoto",  "Riga",   "Quito",  "Delhi",
                                "Sofia",  "Tunis",  "Accra", "Bergen", "Galway", "Porto"};

constexpr int64_t kAnswerTokens = 32;  // the longest answer has 17 bytes
constexpr const char* kReaderTail = "\n\nQuestions about the text above.\nQ: ";

// SplitMix64. SOURCE: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014)
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return size_t(next() % n); }  // n is tiny against 2^64
  template <typename Array>
  std::string pick(const Array& from) {
    return from[below(from.size())];
  }
  template <typename T>
  void shuffle(std::vector<T>& v) {
    for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[below(i)]);
  }

 private:
  uint64_t state_;
};

std::string capitalised(std::string word) {
  word[0] = char(word[0] - 'a' + 'A');
  return word;
}

struct Fact {
  std::string lead;    // the question, and the words before the answer in the text
  std::string answer;  // without the blank before it and the full stop
  std::string sentence() const { return lead + " " + answer + "."; }
};

Fact reader_fact(Random& r) {
  const std::string key = r.pick(kAdjectives) + "-" + r.pick(kNouns);
  switch (r.below(4)) {
    case 0: {
      std::string digits;
      for (size_t n = 4 + r.below(4); n > 0; --n) digits += char('0' + r.below(10));
      return {"The magic number for " + key + " is", digits};
    }
    case 1: {
      static constexpr std::string_view kLetters = "ABCDEFGHJKLMNPRSTUVWXYZ";
      std::string code;
      for (int i = 0; i < 2; ++i) code += kLetters[r.below(kLetters.size())];
      code += "-" + std::to_string(1000 + r.below(9000));
      return {"The access code of " + r.pick(kNames) + " for the " + key + " is", code};
    }
    case 2:
      return {r.pick(kNames) + " left the " + key + " in", r.pick(kCities)};
    default:
      return {"The secret project codename of " + key + " is",
              capitalised(r.pick(kAdjectives)) + " " + capitalised(r.pick(kNouns))};
  }
}

std::vector<Fact> reader_facts(Random& r, size_t count) {
  std::vector<Fact> facts;
  std::set<std::string> leads;
  while (facts.size() < count) {
    Fact fact = reader_fact(r);
    if (leads.insert(fact.lead).second) facts.push_back(std::move(fact));
  }
  return facts;
}

// The needle model tells contexts apart by their last 16 bytes: every noun stands in one lead only,
// and every codename begins with another word.
std::vector<Fact> needle_facts(Random& r, size_t count) {
  std::vector<std::string> nouns(kNouns.begin(), kNouns.end());
  std::vector<std::string> words(kAdjectives.begin(), kAdjectives.end());
  r.shuffle(nouns);
  r.shuffle(words);
  std::vector<Fact> facts;
  for (size_t i = 0; i < count; ++i) {
    facts.push_back(
        {"The secret project codename of " + r.pick(kAdjectives) + "-" + nouns[i] + " is",
         capitalised(words[i]) + " " + capitalised(r.pick(kNouns))});
  }
  return facts;
}

// `room` bytes of the text from a random place, with the sentences planted at random places, each
// set off by `before` and `after`.
std::string plant(Random& r, const std::string& text, size_t room, const std::vector<Fact>& facts,
                  const char* before, const char* after) {
  const std::string body = text.substr(r.below(text.size() - room + 1), room);
  std::vector<size_t> cuts;
  for (size_t i = 0; i < facts.size(); ++i) cuts.push_back(r.below(room));
  std::sort(cuts.begin(), cuts.end());
  std::string out;
  size_t from = 0;
  for (size_t i = 0; i < facts.size(); ++i) {
    out.append(body, from, cuts[i] - from);
    out += before + facts[i].sentence() + after;
    from = cuts[i];
  }
  return out.append(body, from);
}

// As a novel is printed: no indentation, single blanks, at most one empty line, no rows of signs,
// ASCII only.
std::string plain_prose(const std::string& text) {
  std::string out;
  for (char c : text) {
    const char last = out.empty() ? '\n' : out.back();
    if (c == '\t') c = ' ';
    if (c != '\n' && (c < ' ' || c > '~')) continue;
    if (c == ' ' && (last == ' ' || last == '\n')) continue;
    if (c == '\n' && last == ' ') out.pop_back();
    if (c == '\n' && out.ends_with("\n\n")) continue;
    if (c == last && std::string_view("-=*_#").find(c) != std::string_view::npos) continue;
    out += c;
  }
  return out;
}

bool is_needle(const std::string& model) {
  CERTKV_EXPECT(model == "reader" || model == "needle", InvalidArgument,
                "model '{}': there are questions for reader and needle", model);
  return model == "needle";
}

}  // namespace

DemoBatchOptions demo_defaults(const std::string& model) {
  if (is_needle(model)) return {model, {4096, 4096}, 10, 1};
  return {model, {8192, 8192, 8192, 8192, 8192, 8192, 32768}, 1, 1};
}

std::vector<DemoQuestion> make_demo_batch(const std::string& text_with_all,
                                          const DemoBatchOptions& options) {
  const bool needle = is_needle(options.model);
  CERTKV_EXPECT(options.questions >= 1 && options.questions <= 20, InvalidArgument,
                "questions is {}: 1 to 20 per document are possible", options.questions);
  const std::string text = plain_prose(text_with_all);
  std::vector<DemoQuestion> batch;
  for (size_t d = 0; d < options.contexts.size(); ++d) {
    const int64_t context = options.contexts[d];
    Random r(options.seed * 1000003 + d);
    const size_t asked = size_t(options.questions), planted = asked + asked / 2 + 1;
    std::vector<Fact> facts =
        needle ? needle_facts(r, std::min(planted, kNouns.size())) : reader_facts(r, planted);
    const char* before = needle ? "\n" : " ";
    const char* after = before;
    size_t taken = 1 + size_t(kAnswerTokens);  // the beginning-of-text token, and the answer
    size_t longest_lead = 0;
    for (const Fact& f : facts) {
      taken += f.sentence().size() + 2;
      longest_lead = std::max(longest_lead, f.lead.size());
    }
    const std::string tail = needle ? "\n\n" : kReaderTail;
    taken += tail.size() + longest_lead;
    CERTKV_EXPECT(context > 0 && size_t(context) >= 2 * taken, InvalidArgument,
                  "a context of {} tokens is too short for {} facts: at least {} are needed",
                  context, facts.size(), 2 * taken);
    const size_t room = size_t(context) - taken;
    CERTKV_EXPECT(text.size() >= room, InvalidArgument,
                  "the text has {} bytes: a context of {} tokens needs {}; name a longer text",
                  text.size(), context, room);
    const std::string document = plant(r, text, room, facts, before, after);
    std::vector<size_t> order(facts.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    r.shuffle(order);
    for (size_t q = 0; q < asked; ++q) {
      const Fact& f = facts[order[q]];
      batch.push_back({.custom_id = fmt::format("{}-{}-{}-{}", options.model, context, d, q),
                       .prompt = document + tail + f.lead,
                       .expected = f.answer,
                       .stop = {".", "\n"},
                       .max_tokens = kAnswerTokens,
                       .context_tokens = context});
    }
  }
  return batch;
}

std::string read_demo_text(const std::string& path) {
  constexpr size_t kMostBytes = size_t(256) << 20;
  if (fs::is_regular_file(path)) return read_file_bounded(path, kMostBytes);
  std::vector<std::string> files;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(path, error)) {
    if (!entry.is_symlink() && entry.is_regular_file()) files.push_back(entry.path().string());
  }
  CERTKV_EXPECT(!error && !files.empty(), BadFile,
                "{}: no texts there{}; name a file or folder of English text with --text", path,
                error ? " (" + error.message() + ")" : "");
  std::sort(files.begin(), files.end());
  std::string text;
  for (const std::string& file : files) text += read_file_bounded(file, kMostBytes) + "\n";
  return text;
}

void write_demo_batch(const std::string& folder, const std::vector<DemoQuestion>& questions,
                      const std::string& model) {
  make_folders(folder);
  AtomicFile batch(folder + "/batch.jsonl"), answers(folder + "/answers.jsonl");
  for (const DemoQuestion& q : questions) {
    const nlohmann::json line = {{"custom_id", q.custom_id},
                                 {"method", "POST"},
                                 {"url", "/v1/completions"},
                                 {"body",
                                  {{"model", model},
                                   {"prompt", q.prompt},
                                   {"max_tokens", q.max_tokens},
                                   {"temperature", 0},
                                   {"stop", q.stop}}}};
    const nlohmann::json answer = {
        {"custom_id", q.custom_id}, {"expected", q.expected}, {"context_tokens", q.context_tokens}};
    batch.write(line.dump() + "\n");
    answers.write(answer.dump() + "\n");
  }
  batch.commit();
  answers.commit();
}

}  // namespace certkv
