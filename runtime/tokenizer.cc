#include "runtime/tokenizer.h"

#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "runtime/json_file.h"
#include "runtime/tokenizer/parts.h"
#include "runtime/tokenizer/utf8.h"

namespace certkv {
namespace {

constexpr size_t kMaxTextBytes = size_t(64) << 20;
constexpr size_t kMaxModelBytes = size_t(64) << 20;

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<const Parts> parts) : parts_(std::move(parts)) {}
Tokenizer::~Tokenizer() = default;

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special,
                                       SpecialInText special) const {
  CERTKV_EXPECT(text.size() <= kMaxTextBytes, InvalidArgument,
                "text of {} bytes; at most {} can be encoded", text.size(), kMaxTextBytes);
  const Parts& p = *parts_;
  const bool parse = special == SpecialInText::Parse;
  std::string repaired;
  if (!utf8::valid(text)) text = repaired = utf8::repaired(text);
  std::vector<int32_t> ids;

  // Tokens of the raw text, then tokens of the normalised text between them, then words.
  std::vector<AddedTokens::Piece> raw, inner;
  p.added.split(text, false, parse, raw);
  Words words;
  for (const auto& outer : raw) {
    if (outer.id >= 0) {
      ids.push_back(outer.id);
      continue;
    }
    const std::string_view piece = text.substr(outer.span.begin, outer.span.end - outer.span.begin);
    const std::string normal = p.normalizer.empty() ? std::string() : p.normalizer.apply(piece);
    const std::string_view view = p.normalizer.empty() ? piece : std::string_view(normal);
    inner.clear();
    p.added.split(view, true, parse, inner);
    for (const auto& part : inner) {
      if (part.id >= 0) {
        ids.push_back(part.id);
        continue;
      }
      const std::string_view between =
          view.substr(part.span.begin, part.span.end - part.span.begin);
      if (p.pieces) {
        p.pieces->encode(between, ids);
        continue;
      }
      words.list.assign(1, {between, outer.span.begin == 0 && part.span.begin == 0});
      words.owned.clear();
      p.pre_tokenizer.apply(words);
      for (const Word& w : words.list) p.bpe->encode(w.text, ids);
    }
  }
  return add_special ? with_special(std::move(ids)) : ids;
}

std::vector<int32_t> Tokenizer::with_special(std::vector<int32_t> ids) const {
  ids.insert(ids.begin(), parts_->prefix.begin(), parts_->prefix.end());
  ids.insert(ids.end(), parts_->suffix.begin(), parts_->suffix.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string out;
  Decoder::Progress progress;
  for (const int32_t id : ids) {
    if (!(skip_special && is_special(id))) parts_->decoder->push(id, progress, out);
  }
  parts_->decoder->finish(progress, out);
  return out;
}

size_t Tokenizer::vocab_size() const {
  return parts_->names.size();
}
std::optional<int32_t> Tokenizer::bos_id() const {
  return parts_->bos;
}
std::optional<int32_t> Tokenizer::eos_id() const {
  return parts_->eos;
}
bool Tokenizer::is_special(int32_t id) const {
  return parts_->added.is_special(id);
}

std::optional<int32_t> Tokenizer::token_id(std::string_view token) const {
  const auto at = parts_->ids.find(token);
  return at == parts_->ids.end() ? std::nullopt : std::optional<int32_t>(at->second);
}

std::string Tokenizer::token_name(int32_t id) const {
  return id >= 0 && size_t(id) < parts_->names.size() ? parts_->names[size_t(id)] : std::string();
}

const std::optional<std::string>& Tokenizer::chat_template_text() const {
  return parts_->chat_template;
}

std::shared_ptr<const Tokenizer> load_tokenizer_from_json_text(std::string_view tokenizer_json,
                                                               std::string_view config,
                                                               const std::string& name) {
  return std::make_shared<const Tokenizer>(read_tokenizer_json(
      parse_json(tokenizer_json, name), parse_json(config, "tokenizer_config.json"), name));
}

std::shared_ptr<const Tokenizer> load_tokenizer(const std::string& folder) {
  nlohmann::json config = nlohmann::json::object();
  if (folder_has(folder, "tokenizer_config.json"))
    config = load_json_file(path_in_folder(folder, "tokenizer_config.json"));
  // Newer folders keep the chat template in a file of its own.
  if (config.is_object() && folder_has(folder, "chat_template.jinja"))
    config["chat_template"] =
        read_file_bounded(path_in_folder(folder, "chat_template.jinja"), 1 << 20);
  if (folder_has(folder, "tokenizer.json")) {
    const std::string path = path_in_folder(folder, "tokenizer.json");
    return std::make_shared<const Tokenizer>(
        read_tokenizer_json(load_json_file(path), config, path));
  }
  CERTKV_EXPECT(folder_has(folder, "tokenizer.model"), BadFile,
                "{}: neither tokenizer.json nor tokenizer.model is there", folder);
  const std::string path = path_in_folder(folder, "tokenizer.model");
  return std::make_shared<const Tokenizer>(
      read_tokenizer_model(read_file_bounded(path, kMaxModelBytes), config, path));
}

struct StreamingDecoder::State {
  std::shared_ptr<const Tokenizer> tokenizer;
  bool skip_special;
  Decoder::Progress progress;
};

StreamingDecoder::StreamingDecoder(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special)
    : state_(std::make_unique<State>(State{std::move(tokenizer), skip_special, {}})) {}
StreamingDecoder::~StreamingDecoder() = default;
StreamingDecoder::StreamingDecoder(StreamingDecoder&&) noexcept = default;
StreamingDecoder& StreamingDecoder::operator=(StreamingDecoder&&) noexcept = default;

std::string StreamingDecoder::push(int32_t id) {
  std::string out;
  if (!(state_->skip_special && state_->tokenizer->is_special(id)))
    state_->tokenizer->parts().decoder->push(id, state_->progress, out);
  return out;
}

std::string StreamingDecoder::finish() {
  std::string out;
  state_->tokenizer->parts().decoder->finish(state_->progress, out);
  return out;
}

}  // namespace certkv
