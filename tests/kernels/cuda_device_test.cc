// A device's memory, its order, and the parts of a graph that it decides on itself: in emulation
// and, as a program of tests/gpu, on a GPU.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "tests/support/device_ops.h"

namespace certkv {
namespace {

class DeviceTest : public OnTestDevice {
 protected:
  // Words of the device, all 0.
  cuda::DeviceArray<uint32_t> words(size_t count) { return put(std::vector<uint32_t>(count, 0)); }
  void set(const cuda::DeviceArray<uint32_t>& to, size_t i, uint32_t value) {
    device_->copy(to.data() + i, &value, sizeof value);
    wait();
  }
  void mark(const cuda::DeviceArray<uint32_t>& to, size_t i) { device_->fill(to.data() + i, 1, 1); }
};

TEST_F(DeviceTest, CopiesAndFillsInOrder) {
  const auto a = put(std::vector<uint32_t>{1, 2, 3});
  const auto b = words(3);
  device_->copy(b.data(), a.data(), a.bytes());
  device_->fill(a.data(), 0xff, 4);
  device_->copy(b.data() + 2, a.data(), 4);
  EXPECT_EQ(get(b), (std::vector<uint32_t>{1, 2, 0xffffffffu}));
}

TEST_F(DeviceTest, DoesAPartWhenItsWordIsSet) {
  const auto word = words(2), done = words(2);
  const auto part = [&] {
    device_->when(word.data(), [&] {
      mark(done, 0);
      device_->when(word.data() + 1, [&] { mark(done, 1); });
    });
  };
  part();
  EXPECT_EQ(get(done), (std::vector<uint32_t>{0, 0}));
  set(word, 0, 1);
  part();
  EXPECT_EQ(get(done), (std::vector<uint32_t>{1, 0}));
  set(word, 1, 7);
  part();
  EXPECT_EQ(get(done), (std::vector<uint32_t>{1, 1}));
}

// A captured part is decided anew at every launch; nothing is done at the capture.
TEST_F(DeviceTest, AGraphDecidesItsPartsAtEveryLaunch) {
  const auto word = words(3), done = words(5);
  const auto graph = device_->capture([&] {
    mark(done, 0);
    device_->when(word.data(), [&] {
      mark(done, 1);
      device_->fill(word.data() + 2, 1, 1);  // decides what follows
      device_->when(word.data() + 1, [&] { mark(done, 2); });
      device_->when(word.data() + 2, [&] { mark(done, 3); });
    });
    mark(done, 4);
  });
  EXPECT_EQ(get(done), std::vector<uint32_t>(5, 0));
  const auto launch = [&](uint32_t first, uint32_t second) {
    device_->fill(done.data(), 0, done.bytes());
    set(word, 0, first);
    set(word, 1, second);
    set(word, 2, 0);
    device_->launch(*graph);
    return get(done);
  };
  EXPECT_EQ(launch(0, 1), (std::vector<uint32_t>{1, 0, 0, 0, 1}));
  EXPECT_EQ(launch(1, 0), (std::vector<uint32_t>{1, 1, 0, 1, 1}));
  EXPECT_EQ(launch(5, 9), (std::vector<uint32_t>{1, 1, 1, 1, 1}));
  EXPECT_EQ(launch(0, 0), (std::vector<uint32_t>{1, 0, 0, 0, 1}));
}

// What goes beside begins after all that came before, and is done when it is joined.
TEST_F(DeviceTest, WorkBesideOtherWorkIsDoneOnceItIsJoined) {
  constexpr int kAll = cuda::Device::kBranches;
  static_assert(kAll == 3);
  const auto a = words(1), b = words(2 * kAll);
  const auto work = [&] {
    for (int branch = 0; branch < kAll; ++branch) {
      device_->fill(a.data(), uint8_t(1 + branch), 1);
      device_->beside(branch, [&] { device_->copy(b.data() + branch, a.data(), 4); });
      device_->join(branch);
      device_->copy(b.data() + kAll + branch, b.data() + branch, 4);
    }
  };
  const std::vector<uint32_t> done = {1, 2, 3, 1, 2, 3};
  work();
  EXPECT_EQ(get(b), done);
  device_->fill(b.data(), 0, b.bytes());
  const auto graph = device_->capture(work);
  EXPECT_EQ(get(b), std::vector<uint32_t>(2 * kAll, 0));
  for (int launch = 0; launch < 3; ++launch) device_->launch(*graph);
  EXPECT_EQ(get(b), done);
}

// What the device decides on may go beside other work, which then need not wait for it.
TEST_F(DeviceTest, APartUnderAWordGoesBesideOtherWork) {
  const auto word = words(1), done = words(2);
  const auto graph = device_->capture([&] {
    device_->beside(0, [&] { device_->when(word.data(), [&] { mark(done, 0); }); });
    mark(done, 1);
    device_->join(0);
  });
  device_->launch(*graph);
  EXPECT_EQ(get(done), (std::vector<uint32_t>{0, 1}));
  set(word, 0, 1);
  device_->launch(*graph);
  EXPECT_EQ(get(done), (std::vector<uint32_t>{1, 1}));
}

// An emulated device that does it late sees who does not wait for it.
TEST(EmulatedDevice, DoesLateWhatGoesBesideOtherWork) {
  const auto device = cuda::make_emulated_device({.late = true});
  std::string order;
  const auto note = [&](char c) { return [&order, c] { order += c; }; };
  const auto work = [&] {
    device->beside(0, note('a'));
    device->beside(1, note('b'));
    note('1')();
    device->join(0);
    note('2')();
    device->join(1);
  };
  work();
  EXPECT_EQ(std::exchange(order, ""), "ab12") << "nothing is launched again: all in order";
  const auto graph = device->capture(work);
  device->launch(*graph);
  EXPECT_EQ(std::exchange(order, ""), "1a2b");
  const auto open = device->capture([&] { device->beside(0, note('c')); });
  EXPECT_THROW(device->launch(*open), Error);
  device->launch(*graph);
  EXPECT_EQ(order, "1a2b") << "what was left is gone";
}

// What is fetched is what was there once all work before it was done; work enqueued afterwards goes
// on beside it.
TEST_F(DeviceTest, FetchesWhatTheWorkBeforeHasWritten) {
  constexpr size_t kWords = 1 << 20;
  const auto a = words(kWords), b = words(kWords);
  cuda::HostArray<uint32_t> host(*device_, 3 * kWords, "a test's words");
  for (uint8_t round = 1; round < 4; ++round) {
    device_->fill(a.data(), round, a.bytes());
    const cuda::Device::Fetch parts[] = {{host.data(), a.data(), a.bytes()},
                                         {host.data() + kWords, a.data(), 4}};
    device_->fetch(parts);
    device_->fill(b.data(), uint8_t(round + 100), b.bytes());
    const cuda::Device::Fetch more = {host.data() + 2 * kWords, b.data(), b.bytes()};
    device_->fetch({&more, 1});
    device_->await_fetches(Deadline::after(std::chrono::seconds(60)));
    const uint32_t is = round * 0x01010101u, beside = (round + 100) * 0x01010101u;
    EXPECT_EQ(std::count(host.data(), host.data() + kWords + 1, is), ptrdiff_t(kWords + 1));
    EXPECT_EQ(std::count(host.data() + 2 * kWords, host.data() + 3 * kWords, beside),
              ptrdiff_t(kWords));
  }
  device_->settle(Deadline::after(std::chrono::seconds(60)));
}

// In emulation a fetch is as late as its waits allow, or at once; who frees its memory is told.
TEST(EmulatedDevice, FetchesLateOrAtOnceAndNamesMemoryThatWentTooEarly) {
  const auto far = Deadline::after(std::chrono::seconds(60));
  for (const bool late : {true, false}) {
    const auto device = cuda::make_emulated_device({.late_fetches = late});
    cuda::DeviceArray<uint8_t> a(*device, 1, "a byte");
    cuda::HostArray<uint8_t> host(*device, 1, "a byte");
    host[0] = 9;
    device->fill(a.data(), 5, 1);
    const cuda::Device::Fetch part = {host.data(), a.data(), 1};
    device->fetch({&part, 1});
    EXPECT_EQ(host[0], late ? 9 : 5);
    device->fill(a.data(), 6, 1);  // which its waits do not allow
    device->synchronize(far);
    EXPECT_EQ(host[0], late ? 9 : 5);
    device->await_fetches(far);
    EXPECT_EQ(host[0], late ? 6 : 5);
    for (const bool of_host : {false, true}) {
      const auto other = cuda::make_emulated_device({.late_fetches = late});
      cuda::DeviceArray<uint8_t> from(*other, 1, "a byte");
      cuda::HostArray<uint8_t> to(*other, 1, "a byte");
      const cuda::Device::Fetch under_way = {to.data(), from.data(), 1};
      other->fetch({&under_way, 1});
      if (of_host) to.reset();
      from.reset();
      for (int n = 0; n < 2; ++n)
        EXPECT_EQ(thrown_by([&] {
                    other->await_fetches(far);
                  }).starts_with("DeviceError: memory was freed while a fetch used it"),
                  late);
    }
  }
}

TEST_F(DeviceTest, MoreMemoryThanThereIsIsRefusedWithItsFigures) {
  const uint64_t total = device_->total_bytes();
  EXPECT_LE(device_->free_bytes(), total);
  const std::string error = thrown_by([&] { device_->allocate(2 * total, "a cache of tests"); });
  EXPECT_EQ(error.find("OutOfMemory: a cache of tests: "), 0u) << error;
  EXPECT_NE(error.find(std::to_string(2 * total)), std::string::npos) << error;
  EXPECT_NE(error.find("of " + std::to_string(total) + " are free"), std::string::npos) << error;
  // It goes on all the same.
  const auto a = put(std::vector<uint32_t>{4});
  EXPECT_EQ(get(a), std::vector<uint32_t>{4});
}

TEST_F(DeviceTest, ReadsMappedHostMemory) {
  alignas(4096) static std::byte memory[8192];
  memory[5000] = std::byte(77);
  const std::byte* mapped = device_->map_host(memory, sizeof memory);
  const auto a = words(1);
  device_->copy(a.data(), mapped + 5000, 1);
  EXPECT_EQ(get(a)[0], 77u);
  device_->unmap_host(memory);
}

}  // namespace
}  // namespace certkv
