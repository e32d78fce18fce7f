#include <algorithm>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "runtime/json_file.h"
#include "runtime/tokenizer/parts.h"

namespace certkv {
namespace {

using nlohmann::json;

const json kNull;

const json& member_or_null(const json& object, const char* key) {
  const auto at = object.find(key);
  return at == object.end() ? kNull : *at;
}

// Enters a token by name and id; the same pair may come again.
void enter(Tokenizer::Parts& p, const std::string& token, int32_t id, const std::string& name) {
  const auto [known, fresh] = p.ids.try_emplace(token, id);
  CERTKV_EXPECT(fresh || known->second == id, BadFile, "{}: token '{:.80}' has two ids, {} and {}",
                name, token, known->second, id);
  if (size_t(id) >= p.names.size()) p.names.resize(size_t(id) + 1);
  std::string& slot = p.names[size_t(id)];
  CERTKV_EXPECT(slot.empty() || slot == token, BadFile,
                "{}: id {} belongs to two tokens, '{:.80}' and '{:.80}'", name, id, slot, token);
  slot = token;
}

void enter_added(Tokenizer::Parts& p, std::vector<AddedToken> tokens, const json& config,
                 const std::string& name) {
  for (const AddedToken& t : tokens) enter(p, t.content, t.id, name);
  const auto known = [&](const AddedToken& t) {
    return std::any_of(tokens.begin(), tokens.end(), [&](const auto& o) { return o.id == t.id; });
  };
  // Tokens that only the configuration knows count as well.
  const auto extra = read_added_tokens_decoder(member_or_null(config, "added_tokens_decoder"),
                                               "tokenizer_config.json");
  for (const AddedToken& t : extra) {
    enter(p, t.content, t.id, "tokenizer_config.json");
    if (!known(t)) tokens.push_back(t);
  }
  p.added = AddedTokens(std::move(tokens), p.normalizer);
}

// A special token of tokenizer_config.json: a string, or an object with "content".
std::optional<int32_t> configured(const Tokenizer::Parts& p, const json& config, const char* key) {
  const json& value = member_or_null(config, key);
  if (value.is_null()) return std::nullopt;
  const std::string where = fmt::format("tokenizer_config.json: {}", key);
  const std::string& token =
      value.is_object() ? json_string(value, "content", where) : json_string(config, key, where);
  const auto at = p.ids.find(token);
  CERTKV_EXPECT(at != p.ids.end(), BadFile, "{} '{:.80}' is not in the vocabulary", where, token);
  return at->second;
}

void read_config(Tokenizer::Parts& p, const json& config) {
  CERTKV_EXPECT(config.is_object(), BadFile, "tokenizer_config.json: must be an object");
  p.bos = configured(p, config, "bos_token");
  p.eos = configured(p, config, "eos_token");
  const json& chat = member_or_null(config, "chat_template");
  if (chat.is_string()) p.chat_template = chat.get<std::string>();
  if (chat.is_array()) {  // named templates: the default one
    for (const json& one : chat)
      if (one.is_object() && one.value("name", json()) == "default" && one.contains("template"))
        p.chat_template = json_string(one, "template", "tokenizer_config.json: chat_template");
  }
}

void read_template(Tokenizer::Parts& p, const json& spec, const std::string& name) {
  const std::string where = name + ": post_processor";
  const json& tokens = json_member(spec, "special_tokens", where);
  const json& single = json_member(spec, "single", where);
  CERTKV_EXPECT(single.is_array() && single.size() <= 64, BadFile,
                "{}: single must be a list of at most 64", where);
  bool text_seen = false;
  for (const json& item : single) {
    CERTKV_EXPECT(item.is_object() && item.size() == 1, BadFile,
                  "{}: an item of single must be one SpecialToken or Sequence", where);
    if (item.contains("Sequence")) {
      CERTKV_EXPECT(!text_seen && json_string(item["Sequence"], "id", where) == "A", BadFile,
                    "{}: single must hold sequence A once", where);
      text_seen = true;
      continue;
    }
    const std::string& id = json_string(json_member(item, "SpecialToken", where), "id", where);
    const json& ids = json_member(json_member(tokens, id.c_str(), where), "ids", where);
    CERTKV_EXPECT(ids.is_array() && ids.size() <= 64, BadFile, "{}: ids of '{:.80}' must be a list",
                  where, id);
    for (const json& one : ids) {
      const bool fits = one.is_number_unsigned() && one.get<uint64_t>() < p.names.size() &&
                        !p.names[one.get<size_t>()].empty();
      CERTKV_EXPECT(fits, BadFile, "{}: '{:.80}' has id {}, which is no token", where, id,
                    one.dump());
      (text_seen ? p.suffix : p.prefix).push_back(one.get<int32_t>());
    }
  }
  CERTKV_EXPECT(text_seen, BadFile, "{}: single does not hold sequence A", where);
}

void read_post_processor(Tokenizer::Parts& p, const json& spec, const std::string& name,
                         bool& template_seen) {
  if (spec.is_null()) return;
  const std::string where = name + ": post_processor";
  const std::string& type = json_string(spec, "type", where);
  if (type == "Sequence") {
    const json& list = json_member(spec, "processors", where);
    CERTKV_EXPECT(list.is_array() && list.size() <= 16, BadFile,
                  "{}: processors must be a list of at most 16", where);
    for (const json& one : list) read_post_processor(p, one, name, template_seen);
  } else if (type == "TemplateProcessing") {
    CERTKV_EXPECT(!template_seen, BadFile, "{}: two TemplateProcessing", where);
    template_seen = true;
    read_template(p, spec, name);
  } else {
    CERTKV_EXPECT(type == "ByteLevel", BadFile,  // which only moves offsets
                  "{}: '{:.60}' is not supported; supported: Sequence, TemplateProcessing, "
                  "ByteLevel",
                  where, type);
  }
}

}  // namespace

std::unique_ptr<const Tokenizer::Parts> read_tokenizer_json(const json& tokenizer,
                                                            const json& config,
                                                            const std::string& name) {
  CERTKV_EXPECT(tokenizer.is_object(), BadFile, "{}: must be an object", name);
  auto p = std::make_unique<Tokenizer::Parts>();
  p->normalizer = Normalizer(member_or_null(tokenizer, "normalizer"), name);
  p->pre_tokenizer = PreTokenizer(member_or_null(tokenizer, "pre_tokenizer"), name);
  p->bpe = std::make_unique<BpeModel>(json_member(tokenizer, "model", name),
                                      p->pre_tokenizer.byte_level(), name);
  for (const auto& [token, id] : p->bpe->vocabulary()) {
    if (!token.empty()) enter(*p, token, id, name);
  }
  enter_added(*p, read_added_tokens(member_or_null(tokenizer, "added_tokens"), name), config, name);
  bool template_seen = false;
  read_post_processor(*p, member_or_null(tokenizer, "post_processor"), name, template_seen);
  p->decoder = std::make_unique<Decoder>(member_or_null(tokenizer, "decoder"), p->names, name);
  read_config(*p, config);
  return p;
}

std::unique_ptr<const Tokenizer::Parts> read_tokenizer_model(const std::string& model,
                                                             const json& config,
                                                             const std::string& name) {
  auto p = std::make_unique<Tokenizer::Parts>();
  auto pieces = std::make_unique<SentencePieceModel>(model, name);
  std::vector<AddedToken> tokens;
  for (size_t id = 0; id < pieces->names().size(); ++id)
    enter(*p, pieces->names()[id], int32_t(id), name);
  for (const int32_t id : pieces->control_ids())
    tokens.push_back({.id = id, .content = p->names[size_t(id)], .special = true});
  read_config(*p, config);
  if (!p->bos) p->bos = pieces->bos();
  if (!p->eos) p->eos = pieces->eos();
  enter_added(*p, std::move(tokens), config, name);
  if (json_bool_or(config, "add_bos_token", true, "tokenizer_config.json") && p->bos)
    p->prefix.push_back(*p->bos);
  if (json_bool_or(config, "add_eos_token", false, "tokenizer_config.json") && p->eos)
    p->suffix.push_back(*p->eos);
  p->decoder =
      std::make_unique<Decoder>(Decoder::for_sentencepiece(p->names, pieces->adds_space()));
  p->pieces = std::move(pieces);
  return p;
}

}  // namespace certkv
