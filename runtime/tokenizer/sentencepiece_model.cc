#include "runtime/tokenizer/sentencepiece_model.h"

#include <sentencepiece_processor.h>

#include "kernels/base/error.h"
#include "runtime/tokenizer/bpe.h"
#include "runtime/tokenizer/utf8.h"

namespace certkv {

struct SentencePieceModel::Processor {
  sentencepiece::SentencePieceProcessor library;
};

SentencePieceModel::SentencePieceModel(const std::string& model, const std::string& name)
    : processor_(std::make_unique<Processor>()) {
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
  CERTKV_EXPECT(status.ok(), InvalidArgument, "text cannot be encoded: {:.200}",
                status.ToString());
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
