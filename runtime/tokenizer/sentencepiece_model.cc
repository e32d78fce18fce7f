#include "runtime/tokenizer/sentencepiece_model.h"

#include <sentencepiece_processor.h>

#include "kernels/base/error.h"
#include "runtime/tokenizer/bpe.h"
#include "runtime/tokenizer/utf8.h"

namespace certkv {
namespace {

// One field of a protobuf message at a time.
struct Fields {
  std::string_view rest;
  uint64_t number = 0;
  std::string_view bytes = {};  // of a length-delimited field, else empty

  bool varint(uint64_t& value) {
    value = 0;
    for (unsigned shift = 0; shift < 64 && !rest.empty(); shift += 7) {
      const auto b = static_cast<uint8_t>(rest[0]);
      rest.remove_prefix(1);
      value |= uint64_t(b & 0x7f) << shift;
      if (b < 0x80) return true;
    }
    return false;
  }
  // False at the end; `broken` where the message is not well formed.
  bool next(bool& broken) {
    if (rest.empty()) return false;
    uint64_t key = 0, length = 0;
    broken = true;
    if (!varint(key)) return false;
    number = key >> 3;
    bytes = {};
    switch (key & 7) {
      case 0:
        if (!varint(length)) return false;
        length = 0;
        break;
      case 1:
        length = 8;
        break;
      case 2:
        if (!varint(length)) return false;
        break;
      case 5:
        length = 4;
        break;
      default:
        return false;
    }
    if (length > rest.size()) return false;
    if ((key & 7) == 2) bytes = rest.substr(0, length);
    rest.remove_prefix(length);
    broken = false;
    return true;
  }
};

// The library follows a model's compiled character map without bounds, so a crafted one reads
// anywhere. The families supported here have none (their normaliser is "identity").
void refuse_character_map(const std::string& model, const std::string& name) {
  constexpr uint64_t kNormalizer = 3, kDenormalizer = 5, kCharacterMap = 2;
  bool broken = false;
  for (Fields outer{model}; outer.next(broken);) {
    if (outer.number != kNormalizer && outer.number != kDenormalizer) continue;
    for (Fields inner{outer.bytes}; inner.next(broken);) {
      CERTKV_EXPECT(inner.number != kCharacterMap || inner.bytes.empty(), BadFile,
                    "{}: the model's normaliser has a compiled character map, which is not "
                    "supported (only the identity is); supply a tokenizer.json instead",
                    name);
    }
    if (broken) break;
  }
  CERTKV_EXPECT(!broken, BadFile, "{}: not a SentencePiece model", name);
}

}  // namespace

struct SentencePieceModel::Processor {
  sentencepiece::SentencePieceProcessor library;
};

SentencePieceModel::SentencePieceModel(const std::string& model, const std::string& name)
    : processor_(std::make_unique<Processor>()) {
  refuse_character_map(model, name);
  auto& library = processor_->library;
  const auto status = library.LoadFromSerializedProto(model);
  CERTKV_EXPECT(status.ok(), BadFile, "{}: not a SentencePiece model: {:.200}", name,
                status.ToString());
  const int count = library.GetPieceSize();
  CERTKV_EXPECT(count > 0 && count <= kMaxTokenId + 1, BadFile,
                "{}: {} pieces; 1 to {} are allowed", name, count, kMaxTokenId + 1);
  for (int id = 0; id < count; ++id) {
    const std::string& piece = library.IdToPiece(id);
    CERTKV_EXPECT(piece.size() <= kMaxTokenBytes && utf8::valid(piece), BadFile,
                  "{}: piece {} is longer than {} bytes or not valid UTF-8", name, id,
                  kMaxTokenBytes);
    names_.push_back(piece);
    if (library.IsControl(id) || library.IsUnknown(id)) control_.push_back(id);
  }
  // Told by what it does: the file's own field is not offered by the library.
  std::vector<int> ids;
  adds_space_ = library.Encode("a", &ids).ok() && !ids.empty() &&
                library.IdToPiece(ids[0]).starts_with("\xe2\x96\x81");
}

SentencePieceModel::~SentencePieceModel() = default;

void SentencePieceModel::encode(std::string_view text, std::vector<int32_t>& ids) const {
  std::vector<int> found;
  const auto status = processor_->library.Encode(text, &found);
  CERTKV_EXPECT(status.ok(), InvalidArgument, "text cannot be encoded: {:.200}", status.ToString());
  ids.insert(ids.end(), found.begin(), found.end());
}

std::optional<int32_t> SentencePieceModel::bos() const {
  const int id = processor_->library.bos_id();
  return id < 0 ? std::nullopt : std::optional<int32_t>(id);
}

std::optional<int32_t> SentencePieceModel::eos() const {
  const int id = processor_->library.eos_id();
  return id < 0 ? std::nullopt : std::optional<int32_t>(id);
}

}  // namespace certkv
