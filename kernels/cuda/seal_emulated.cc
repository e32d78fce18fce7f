#include <cstring>

#include "kernels/base/error.h"
#include "kernels/cuda/seal_body.h"
#include "kernels/cuda/seal_ops.h"

namespace certkv::cuda {

void check_seal(const SealArgs& a) {
  CERTKV_EXPECT(a.head_dim == 64 || a.head_dim == emulated::kSealDims, InvalidArgument,
                "head_dim is {}: the device seals 64 and 128", a.head_dim);
  CERTKV_EXPECT(a.dtype == DType::BF16 || a.dtype == DType::F16, InvalidArgument,
                "originals of type {}: F16 or BF16 is needed", dtype_name(a.dtype));
  CERTKV_EXPECT(a.heads >= 0 && a.pages >= 0, InvalidArgument, "{} heads of {} pages to seal",
                a.heads, a.pages);
  CERTKV_EXPECT(a.entries == nullptr || a.pages == 1, InvalidArgument,
                "{} pages at once to seal for a decode: it has 1", a.pages);
  const uint64_t bits = reinterpret_cast<uintptr_t>(a.k) | reinterpret_cast<uintptr_t>(a.v) |
                        reinterpret_cast<uintptr_t>(a.page) |
                        reinterpret_cast<uintptr_t>(a.originals) | a.rows_of_head | a.rows_of_page |
                        a.page_of_head | a.page_of_page;
  CERTKV_EXPECT(bits % 16 == 0, InvalidArgument,
                "rows or pages to seal are not aligned to 16 bytes");
}

void check_digest(const DigestArgs& a) {
  CERTKV_EXPECT(a.count >= 0 && a.per_row > 0, InvalidArgument, "digests of {} pages, {} a row",
                a.count, a.per_row);
  CERTKV_EXPECT(a.lengths == nullptr || a.list != nullptr || a.per_row == 1, InvalidArgument,
                "digests of stretches of several lengths, {} a row: 1, or a list, is needed",
                a.per_row);
  const uint64_t bits = reinterpret_cast<uintptr_t>(a.first) | a.row_stride | a.bytes;
  CERTKV_EXPECT(bits % 16 == 0 && a.bytes <= uint32_t(INT32_MAX), InvalidArgument,
                "pages of {} bytes in rows {} apart: their digests are taken in 16 bytes at a time",
                a.bytes, a.row_stride);
}

void seal_emulated(const SealArgs& args) {
  check_seal(args);
  if (args.halted != nullptr && *args.halted != 0) return;
  emulated::SealShared shared;
  for (int number = 0; number < args.heads * args.pages; ++number) {
    std::memset(&shared, 0xff, sizeof shared);
    const auto all = [&](void (emulated::SealPage::*phase)(int) const) {
      for (int thread = 0; thread < kSealThreads; ++thread)
        (emulated::SealPage{args, number, &shared}.*phase)(thread);
    };
    all(&emulated::SealPage::fit_keys);
    all(&emulated::SealPage::encode);
    all(&emulated::SealPage::serve);
    all(&emulated::SealPage::finish);
  }
}

}  // namespace certkv::cuda
