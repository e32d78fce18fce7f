// The kernels around the pass, warp by warp: appending, paging in, rung 3, learning; climb_body.h
// has the ladder's choice. Included by cache_kernels.cu and cache_emulated.cc alone. See lanes.h
// and DESIGN.md. SOURCE: method sections 5 and 7.
#pragma once

#include "kernels/cuda/canary_body.h"
#include "kernels/cuda/climb_body.h"
#include "kernels/digest.h"

namespace certkv::CERTKV_LANES_NAMESPACE {

using namespace certkv::cuda;  // NOLINT: plain data and constants

CERTKV_FN double total(D x) {
  CERTKV_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) x = x + shuffle_xor(x, mask);
  return uniform(x, 0);
}

// ---- append -------------------------------------------------------------------------------------

// A norm from its square, rounded up. 2^-20: of the sum in double, of the root, and to the float;
// 2^-149: where that one is subnormal.
CERTKV_FN float norm_up(double square) {
  const double norm = std::sqrt(square) * (1 + 0x1p-20);
  return norm > 0 ? float(norm) + 0x1p-149f : (norm == 0 ? 0.0f : __builtin_nanf(""));
}
CERTKV_FN float larger_or_nan(float a, float b) {
  return a > b ? a : (a <= b ? b : __builtin_nanf(""));
}

// Two floats to 16 bits, to nearest even, as float_to_bf16 and float_to_f16; a in the lower half.
CERTKV_FN U brain_of(F x) {
  const U bits = bits_of(x), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return select((bits & 0x7fffffffu) > 0x7f800000u, (bits >> 16) | 0x40u, rounded);
}
CERTKV_FN U pack_originals(DType dtype, F a, F b) {
  return dtype == DType::BF16 ? brain_of(a) | brain_of(b) << 16 : pack_halves(a, b);
}

// Rounds one row of keys or values into the open blocks; returns its norm, and NaN where an element
// is not finite once rounded.
CERTKV_FN float append_row(const AppendArgs& args, const float* from, std::byte* rows, int row) {
  const I lane = lane_index();
  D square = to_double(splat(0));
  bool bad = false;
  for (int first = 0; first < args.head_dim; first += 64) {
    const I at = lane * 2 + first;
    const U pair = pack_originals(args.dtype, load_float(from, at), load_float(from, at + 1));
    const F a = unpack_original(args.dtype, pair, false);
    const F b = unpack_original(args.dtype, pair, true);
    bad = bad || any(!(magnitude(a) <= 3.4e38f)) || any(!(magnitude(b) <= 3.4e38f));
    square = square + to_double(a) * to_double(a) + to_double(b) * to_double(b);
    store(reinterpret_cast<float*>(rows + size_t(row) * size_t(args.head_dim) * 2),
          lane + first / 2, float_of_bits(pair));
  }
  const double sum = total(square);
  return bad ? __builtin_nanf("") : norm_up(sum);
}

// A query for the pass: over sqrt(d), and its norm.
CERTKV_FN void append_query(const AppendArgs& args, const AppendItem& item, const float* q, int h,
                            uint32_t* flags) {
  const I lane = lane_index();
  const double inverse = 1.0 / std::sqrt(double(args.head_dim));
  bool bad = false;
  D square = to_double(splat(0));
  for (int first = 0; first < args.head_dim; first += 32) {
    const F x = load_float(q, lane + first);
    bad = bad || any(!(magnitude(x) <= 3.4e38f));
    square = square + to_double(x) * to_double(x);
    store(item.scaled + h * args.head_dim, lane + first, to_float(to_double(x) * inverse));
  }
  store(item.norm, splat_i(h), splat(norm_up(total(square) * (inverse * inverse) * (1 + 0x1p-50))));
  if (bad) raise_flag(flags, kFlagNonFinite);
}

// Takes the row's norm into its block's note, and returns that.
CERTKV_FN float append_note(float* notes, int in_block, float norm) {
  const float note = in_block == 0 ? norm : larger_or_nan(*notes, norm);
  sync_lanes();  // all have read before any writes
  store(notes, splat_i(0), splat(note));
  return note;
}

// An item's part, a warp each: its queries, its key, its value.
CERTKV_FN void append_part(const AppendArgs& args, int index, int part) {
  const AppendItem& item = args.items[index];
  PassItem& pass = args.passes[index];
  const int d = args.head_dim, row = index / args.kv_heads, kv = index % args.kv_heads;
  if (args.halt.passed()) {  // the queries of the layer that is repeated stay, too
    if (index == 0 && part == args.heads) *args.any_failing = 0;
    return;
  }
  const float* of_row = args.qkv + size_t(row) * size_t((args.heads + 2) * args.kv_heads * d);
  if (part < args.heads)
    return append_query(args, item, of_row + size_t(kv * args.heads + part) * size_t(d), part,
                        pass.flags);
  const float* k = of_row + size_t(args.heads * args.kv_heads + kv) * size_t(d);
  const float* v = k + size_t(args.kv_heads) * size_t(d);
  const int block = item.open / 16, in_block = item.open % 16, note = block * kPageTiles;
  if (part == args.heads) {
    const float norm = append_row(args, k, item.keys, item.open);
    append_note(item.k_norm + note, in_block, norm);
    item.entries[block] = {nullptr, 0xffu, in_block + 1};
    if (!(norm >= 0)) raise_flag(pass.flags, kFlagNonFinite);
    if (index == 0) *args.any_failing = 0;  // of the layer, which begins here
    if (index == 0 && args.redone != nullptr) *args.redone = 0;
    return;
  }
  const float norm = append_row(args, v, item.values, item.open);
  float largest = larger_or_nan(item.sealed_nu, append_note(item.open_nu + note, in_block, norm));
  for (int b = 0; b < block; ++b) largest = larger_or_nan(largest, item.open_nu[b * kPageTiles]);
  // The power of two that brings the largest norm to [1/2, 1), within 2^-120 to 2^120.
  float unit = 1;
  if (largest > 0 && largest <= 3.4e38f) {
    const int exponent = int(uniform(bits_of(splat(largest)), 0) >> 23) - 126;
    const int within = exponent < -120 ? -120 : (exponent > 120 ? 120 : exponent);
    unit = uniform(float_of_bits(splat_u(uint32_t(127 - within) << 23)), 0);
  }
  pass.unit = unit;
  if (!(norm >= 0)) raise_flag(pass.flags, kFlagNonFinite);
}

// ---- paging in ----------------------------------------------------------------------------------

// Where the arena has one tensor of a block, and its digest. False if the slot there is not the one
// that is asked for, or not sealed.
CERTKV_FN bool find_block(const SlotShape& shape, const LadderItem& item, int block, int part,
                          const std::byte** from, uint64_t* written) {
  const I lane = lane_index();
  const int first_blocks = item.run[0].blocks;
  const OriginalsRun& run = block < first_blocks ? item.run[0] : item.run[1];
  const int in_run = block < first_blocks ? block : block - first_blocks;
  if (in_run >= run.blocks) return false;
  const std::byte* slot = run.slots + size_t(in_run) * shape.slot_bytes;
  const U header = load1(slot, lane * 4);
  // Words 2 to 11 of a header are the block's identity, 14 and 15 its shape, 30 and 31 its seal.
  const I at = select((lane > 1) & (lane < 12), lane - 2, splat_i(0));
  U expected = load1(reinterpret_cast<const std::byte*>(run.id), at * 4);
  expected = select(lane == 10, splat_u(uint32_t(block)), expected);
  expected = select(lane == 14, splat_u(shape.header[0]), expected);
  expected = select(lane == 15, splat_u(shape.header[1]), expected);
  const B compared = ((lane > 1) & (lane < 12)) | (lane == 14) | (lane == 15);
  const bool sealed = (uniform(header, 30) | uniform(header, 31)) != 0;
  if (any(compared & (header != expected)) || !sealed) return false;
  const int word = part == kKeys ? 16 : 18;
  *written = uint64_t(uniform(header, word)) | uint64_t(uniform(header, word + 1)) << 32;
  *from = slot + (part == kKeys ? shape.k_offset : shape.v_offset);
  return true;
}

// Reads one tensor of a block from the arena into a slot. True if the slot of the arena is the one
// that was asked for and what has arrived matches its digest.
CERTKV_FN bool fetch_block(const LadderArgs& args, const LadderItem& item, int block, int part,
                           std::byte* to) {
  const I lane = lane_index();
  const std::byte* from = nullptr;
  uint64_t written = 0;
  if (!find_block(args.shape, item, block, part, &from, &written)) return false;
  const int bytes = 16 * args.head_dim * 2;
  W sum = splat_w(0);
  CERTKV_UNROLL_BY_8
  for (int first = 0; first < bytes; first += 512) {
    U words[4];
    load4(from + first, lane * 16, words);
    store4_where(lane >= 0, to + first, lane * 16, words);
    const W index = widen(word_of(lane * 4 + first / 4));
    CERTKV_EACH (e, 4) sum = sum + digest_keys(index + uint64_t(e)) * widen(words[e]);
  }
  const uint64_t digest = kDigestStart + uint64_t(bytes) * kDigestLength + sum_lanes(sum);
  return digest == written;
}

// ---- scrub --------------------------------------------------------------------------------------

// The digest of some bytes, a multiple of 16, as payload_digest(). Sums are whole numbers modulo
// 2^64, so neither their order nor who forms them matters. Lanes beyond the end read the first
// bytes and count them as 0.
CERTKV_FN uint64_t digest_of(const std::byte* from, int bytes) {
  constexpr int kChunkBytes = int(kDigestChunkWords) * 4;
  const I at = lane_index() * 16;
  W sum = splat_w(0);
  uint64_t power = 1;  // of the chunk
  for (int chunk = 0; chunk < bytes; chunk += kChunkBytes) {
    const std::byte* here = from + chunk;
    const int rest = bytes - chunk, length = rest < kChunkBytes ? rest : kChunkBytes;
    W of_chunk = splat_w(0);
    CERTKV_UNROLL_BY_8
    for (int first = 0; first < length; first += 512) {
      const I place = at + first;
      const B within = place < length;
      U words[4];
      load4(here, select(within, place, splat_i(0)), words);
      const W index = widen(word_of(lane_index() * 4 + first / 4));
      CERTKV_EACH (e, 4)
        of_chunk = of_chunk +
                   digest_keys(index + uint64_t(e)) * widen(select(within, words[e], splat_u(0)));
    }
    sum = sum + of_chunk * power;
    power *= kDigestChunk;
  }
  return kDigestStart + uint64_t(bytes) * kDigestLength + sum_lanes(sum);
}

// One warp: the n-th stretch's digest.
CERTKV_FN void digest_stretch(const DigestArgs& args, int n) {
  const std::byte* from = args.list != nullptr
                              ? args.list[n]
                              : args.first + uint64_t(n / args.per_row) * args.row_stride +
                                    uint64_t(n % args.per_row) * args.bytes;
  args.digests[n] = digest_of(from, int(args.lengths != nullptr ? args.lengths[n] : args.bytes));
}

// Whether rows are what the arena has of a block.
template <typename Args>
CERTKV_FN bool holds_block(const Args& args, const LadderItem& item, int block, int part,
                           const std::byte* rows) {
  const std::byte* from = nullptr;
  uint64_t written = 0;
  if (!find_block(args.shape, item, block, part, &from, &written)) return false;
  return digest_of(rows, 16 * args.head_dim * 2) == written;
}

// Whether a slot of the scratch holds what the arena has of a block, and says so.
CERTKV_FN bool resident_is_sound(const TableArgs& args, const LadderItem& item, int block, int part,
                                 int slot) {
  const int at = slot - item.first_slot[part];
  if (at < 0 || at >= item.quota[part] || item.block_of[part][at] != block) return false;
  return holds_block(args, item, block, part,
                     item.slots + size_t(slot) * size_t(16 * args.head_dim * 2));
}

// One warp: the n-th look.
CERTKV_FN void check_table(const TableArgs& args, int n) {
  if (args.halted != nullptr && *args.halted != 0) return;
  const TableLook look = args.list[n];
  const LadderItem& item = args.items[look.item];
  const PageEntry entry = item.pages[look.page];
  const B one = lane_index() < 1;
  uint32_t found = 0, wants = entry.wants & 0xffu;
  for (int bit = 0; bit < 2 * kPageTiles; ++bit) {
    const int part = bit / kPageTiles, block = look.page * kPageTiles + bit % kPageTiles;
    const int slot = item.slot_of[part][block];
    const bool wanted = (wants >> bit & 1u) != 0;
    if (wanted ? resident_is_sound(args, item, block, part, slot) : slot == -1) continue;
    found |= kOriginalsDamaged;
    wants &= ~(1u << bit);
    // The slot is free from now on, but where another block holds it rightly.
    const int at = slot - item.first_slot[part];
    bool free = at >= 0 && at < item.quota[part];
    const int holds = free ? item.block_of[part][at] : -1;
    if (holds != block && holds >= 0 && holds < item.coded_pages * kPageTiles)
      free = free && item.slot_of[part][holds] != slot;
    sync_lanes();  // all have read before any writes
    if (free) store_where(one, item.block_of[part], splat_i(at), splat_i(-1));
    store_where(one, item.slot_of[part], splat_i(block), splat_i(-1));
    sync_lanes();
  }
  if (entry.page != look.codes || entry.tokens != kPageTokens || entry.wants > 0xffu)
    found |= kTableDamaged;
  sync_lanes();
  if (found != 0) item.pages[look.page] = {look.codes, wants, kPageTokens};
  args.found[n] = found;
}

// Uses a block's originals from now on.
CERTKV_FN void want(const LadderItem& item, int block, int part, int slot) {
  const B one = lane_index() < 1;
  auto* wants = reinterpret_cast<uint32_t*>(item.pages);
  const int page = block / kPageTiles, bit = block % kPageTiles + 4 * part;
  store_where(one, item.slot_of[part], splat_i(block), splat_i(slot));
  or_where(one, wants, splat_i(page * 4 + 2), splat_u(1u << bit));
}

CERTKV_FN void unwant(const LadderItem& item, int block, int part) {
  const B one = lane_index() < 1;
  auto* wants = reinterpret_cast<uint32_t*>(item.pages);
  const int page = block / kPageTiles, bit = block % kPageTiles + 4 * part;
  store_where(one, item.slot_of[part], splat_i(block), splat_i(-1));
  and_where(one, wants, splat_i(page * 4 + 2), splat_u(~(1u << bit)));
}

// Warp `at` of `warps` that work for one item.
CERTKV_FN void page_in(const LadderArgs& args, int index, int at, int warps) {
  const LadderItem& item = args.items[index];
  const PageInRequest* list = list_of(args, index);
  const int count = args.halt.passed() ? 0 : int(args.listed[index]);
  for (int n = at; n < count; n += warps) {
    const PageInRequest r = list[n];
    const int slot = item.first_slot[r.part] + r.slot;
    std::byte* rows = item.slots + size_t(slot) * size_t(16 * args.head_dim * 2);
    bool sound = r.resident != 0 && holds_block(args, item, r.block, r.part, rows);
    if (!sound) {
      sound = fetch_block(args, item, r.block, r.part, rows);
      add_count(&item.counts->paged, 1);
    }
    sync_lanes();  // all lanes' rows are there
    // A query that is no number fails its request by name, and says nothing of a block.
    const bool heard = sound && (*args.passes[index].flags & kFlagNonFinite) == 0;
    const uint32_t broken = heard ? Canary{args, index, r.block, rows}.look(r.part) : 0;
    if (sound && broken == 0) {
      want(item, r.block, r.part, slot);
      continue;
    }
    // The codes stand in for it, and are charged as they are; learn() frees the slot.
    store_where(lane_index() < 1, item.block_of[r.part], splat_i(r.slot), splat_i(-1));
    unwant(item, r.block, r.part);
    if (broken != 0) {  // what they are charged is not to be trusted: rung 4 follows
      add_count(&item.counts->canary, 1);
      raise_flag(args.passes[index].any_failing, 1u);
      keep_largest(&item.counts->canary_last, uint32_t(r.block) * 4 + broken);
      continue;
    }
    add_count(&item.counts->digest, 1);
    raise_flag(args.passes[index].flags, kFlagDigest);
  }
}

// ---- rung 3 -------------------------------------------------------------------------------------

// One warp: the items with failing heads, in order; and of rows that a canary has broken, every
// item with all its heads (rung 4), or none, where all ranks are to repeat them.
CERTKV_FN void list_dense(const LadderArgs& args) {
  uint32_t count = 0;
  for (int i = 0; i < args.count && !args.halt.passed(); ++i) {
    const PassItem& pass = args.passes[i];
    const LadderItem& item = args.items[i];
    const int row = i / args.kv_heads, first = row * args.kv_heads;
    bool broken = false;
    for (int n = first; n < first + args.kv_heads; ++n)
      broken = broken || args.items[n].counts->canary != 0;
    if (args.repeat != nullptr) {
      broken = args.repeat[row] != 0;
      if (!broken) continue;
    } else if (broken && args.fallback != nullptr) {
      args.fallback[row] = 1;
      continue;
    }
    if (pass.failing[0] == 0 && !broken) continue;
    args.dense[count++] = i;
    if (item.counts->rounds == 0 && item.counts->dense == 0 && *pass.climbed != 0)
      for (int h = 0; h < pass.heads; ++h) item.candidate[h] = pass.judged[h];
    item.counts->dense = 1;
    sync_lanes();  // all have read before any writes
    if (!broken) continue;
    item.counts->rung4 = 1;
    pass.failing[0] = (1u << pass.heads) - 1;
  }
  *args.dense_count = count;
  for (uint32_t n = 0; n < uint32_t(args.count); ++n) args.dense_listed[n] = n < count ? 1 : 0;
}

// Everything of the n-th listed item into the staging area, originals all; warp `at` of `warps`.
CERTKV_FN void stage_dense(const LadderArgs& args, const DenseArgs& dense, int n, int at,
                           int warps) {
  const int index = args.dense[n];
  const PassItem& pass = args.passes[index];
  const LadderItem& item = args.items[index];
  const int block_bytes = 16 * args.head_dim * 2;
  const B one = lane_index() < 1;
  const int each = pass.repeated_per_split, first_page = dense.first_split * each;
  const int rest = pass.page_count - first_page;
  const int count = rest < dense.splits * each ? rest : dense.splits * each;
  for (int nth = at; nth < count; nth += warps) {
    const int page = first_page + nth;
    const PageEntry entry = pass.pages[page];
    const bool coded = entry.page != nullptr;
    const int tiles = coded ? kPageTiles : (entry.tokens + 15) / 16;
    for (int t = 0; t < kPageTiles; ++t) {
      const int block = page * kPageTiles + t;
      float k_norm = 0, nu = 0;
      int slot[2] = {-1, -1};
      if (t < tiles) {
        // The tables', of pages with codes too: a page whose canary failed is not asked.
        k_norm = pass.k_norm[block];
        nu = pass.open_nu[block];
        for (int part = 0; part < 2; ++part) {
          const int place = (nth * kPageTiles + t) * 2 + part;
          std::byte* to = dense.slots + size_t(place) * size_t(block_bytes);
          bool sound = true;
          if (coded) {
            sound = fetch_block(args, item, block, part, to);
            add_count(&item.counts->paged, 1);
            if (!sound) add_count(&item.counts->digest, 1);
          } else {
            const int from = (part == kKeys ? pass.key_slot : pass.value_slot)[block];
            const std::byte* rows = pass.slots + size_t(from) * size_t(block_bytes);
            for (int first = 0; first < block_bytes; first += 512) {
              U words[4];
              load4(rows + first, lane_index() * 16, words);
              store4_where(lane_index() >= 0, to + first, lane_index() * 16, words);
            }
          }
          if (sound) slot[part] = place;
        }
      }
      for (int part = 0; part < 2; ++part)
        store_where(one, dense.slot_of[part], splat_i(block), splat_i(slot[part]));
      store_where(one, dense.k_norm, splat_i(block), splat(k_norm));
      store_where(one, dense.open_nu, splat_i(block), splat(nu));
    }
    dense.entries[page] = {nullptr, 0xffu, entry.tokens};
  }
  if (at != 0) return;
  PassItem p = pass;
  p.pages_per_split = each;
  p.pages = dense.entries;
  p.key_slot = dense.slot_of[kKeys];
  p.value_slot = dense.slot_of[kValues];
  p.k_norm = dense.k_norm;
  p.open_nu = dense.open_nu;
  p.slots = dense.slots;
  p.slot_count = count > 0 ? 2 * kPageTiles * count : 0;
  p.out = dense.out;
  p.judged = dense.judged;
  p.relative = 0;
  p.tolerance = double(__builtin_inff());  // whatever is a number: the output is exact
  p.failing = dense.failing;
  p.any_failing = dense.failing + 1;
  *dense.pass = p;
}

// One warp: outputs of the n-th listed item's failing heads.
CERTKV_FN void take_dense(const LadderArgs& args, const DenseArgs& dense, int n) {
  const int index = args.dense[n];
  const PassItem& pass = args.passes[index];
  const uint32_t failing = pass.failing[0];
  Certificate* judged = *pass.climbed != 0 ? pass.judged : args.items[index].candidate;
  const I lane = lane_index();
  for (int h = 0; h < pass.heads; ++h) {
    if ((failing >> h & 1u) == 0) continue;
    const bool lost = !(dense.judged[h].bound >= 0);
    for (int first = 0; first < args.head_dim; first += 32) {
      const I at = lane + (h * args.head_dim + first);
      store(pass.out, at, lost ? splat(0) : load_float(dense.out, at));
    }
    judged[h] = dense.judged[h];
  }
}

// ---- what stays near the compute ----------------------------------------------------------------

inline constexpr double kDecay = 0.85;  // as runtime/certify/learn.cc
inline constexpr double kKeepShare = 0.25;

CERTKV_FN F select_larger(F a, F b) {  // NaN stays
  return select(a > b, a, select(a <= b, b, a + b));
}
// A note of a block that a lane names.
CERTKV_FN F load_note(const PassItem& pass, int head_dim, I page, I tile, int which) {
  return load_note_of(pass.pages, page, tile * 6 + (8 + which), notes_offset(head_dim));
}

inline constexpr int kLearnWarps = 16;

struct LearnShared {
  double may[kMaxHeads], ref[kMaxHeads], over_l[kMaxHeads];
  uint32_t empty[2][kMostSlots / 32], held[2][kMostSlots / 32];  // a bit for each slot
};

// One block of warps for each item: scores what is resident by what its codes would have cost,
// drops what costs little, and lists the free slots anew. prepare(), score(), list_free(), with a
// barrier between.
struct Learn {
  const LadderArgs& args;
  int index, warp;
  LearnShared* shared;

  CERTKV_FN const LadderItem& item() const { return args.items[index]; }
  CERTKV_FN const PassItem& pass() const { return args.passes[index]; }
  CERTKV_FN int words(int part) const { return (item().quota[part] + 31) / 32; }
  CERTKV_FN bool due() const {
    return !args.halt.passed() && (*pass().climbed != 0) == args.climbed;
  }

  CERTKV_FN void prepare() const {
    if (warp >= pass().heads) return;
    const double* merged = pass().merged + warp * sums_floats(args.head_dim);
    shared->may[warp] = allowed_error(pass().judged[warp], pass().relative != 0, pass().tolerance);
    shared->ref[warp] = merged[kSumRef];
    shared->over_l[warp] = 1.0 / merged[kSumL];
  }

  CERTKV_FN void score() const {
    for (int task = warp; task < words(0) + words(1); task += kLearnWarps)
      score_slots(task < words(0) ? kKeys : kValues, task < words(0) ? task : task - words(0));
  }
  // 32 slots of a part.
  CERTKV_FN void score_slots(int part, int word) const {
    const LadderItem& to = item();
    const PassItem& p = pass();
    const I slot = lane_index() + word * 32;
    const B exists = slot < to.quota[part];
    const I held = load_int(to.block_of[part], select(exists, slot, splat_i(0)));
    const B holds = exists & (held >= 0);
    const uint32_t mask = ballot(holds);
    uint32_t dropped = 0;
    if (mask != 0) {
      const I block = select(holds, held, splat_i(0));
      const I tile = block & (kPageTiles - 1), page = block >> 2;
      const F before = load_float(to.score[part], select(exists, slot, splat_i(0)));
      const F note = load_note(p, args.head_dim, page, tile, part == kKeys ? 1 : 0);
      F most = splat(0);
      for (int h = 0; h < p.heads; ++h) {
        const I record = page * (args.groups * kRecordFloats) + (h / 4) * kRecordFloats;
        const F sum = load_float(p.records, record + tile * 4 + h % 4);
        const F ref = load_float(p.records, record + tile * 4 + (kRecordRef + h % 4));
        const F bound = load_float(p.records, record + (kRecordBound + h % 4));
        D cost = to_double(sum) * exponential(to_double(ref) - shared->ref[h]) * to_double(note) *
                 (shared->over_l[h] / shared->may[h]);
        if (part == kKeys) cost = cost * to_double(c_of_large(bound + float(kEpsWDevice))) * 2.0;
        most = select_larger(most, to_float(cost));
      }
      const F aged = before * float(kDecay);
      const F now = select_larger(most, select(aged > 0, aged, splat(0)));
      const float keep = float(kKeepShare / to.quota[part]);
      const B drop = holds & (now < keep);
      store_where(exists, to.score[part], slot, select(holds, now, splat(0)));
      store_where(drop, to.block_of[part], slot, splat_i(-1));
      store_where(drop, to.slot_of[part], block, splat_i(-1));
      and_where(drop, reinterpret_cast<uint32_t*>(to.pages), page * 4 + 2,
                ~(splat_u(1) << word_of(tile + 4 * part)));
      dropped = ballot(drop);
      const int kept = population(ballot(holds & (before < 0)) & ~dropped);
      if (kept > 0) add_count(&to.counts->prefetched_used, uint32_t(kept));
    }
    const uint32_t free = (ballot(exists) & ~mask) | dropped;
    shared->empty[part][word] = free;
    shared->held[part][word] = mask;
  }

  CERTKV_FN void list_free() const {
    const LadderItem& to = item();
    for (int part = 0; part < 2; ++part) {
      int before = 0, resident = 0;
      for (int word = 0; word < words(part); ++word) {
        const uint32_t free = shared->empty[part][word];
        if (word % kLearnWarps == warp) {
          const B mine = (splat_u(free) >> word_of(lane_index()) & 1u) != 0u;
          store_where(mine, to.free_slots[part], rank_in(free) + before, lane_index() + word * 32);
        }
        before += population(free);
        resident += population(shared->held[part][word]);
      }
      if (warp != 0) continue;
      to.free_count[part] = before;
      (part == kKeys ? to.counts->resident_keys : to.counts->resident_values) = uint32_t(resident);
    }
  }
};

}  // namespace certkv::CERTKV_LANES_NAMESPACE

#undef CERTKV_FN
