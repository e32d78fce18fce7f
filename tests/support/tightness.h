// How much of its bound the true error uses: reported, so that a change that loosens a bound is
// seen.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

namespace certkv {

class Tightness {
 public:
  void add(const std::string& group, std::span<const float> ratios);  // true error / bound
  float largest(const std::string& group) const;                      // 0 where nothing was added
  size_t count() const;
  // One line a group: name, how many, median and largest ratio.
  std::string table(const std::string& title) const;

 private:
  std::map<std::string, std::vector<float>> ratios_;
};

}  // namespace certkv
