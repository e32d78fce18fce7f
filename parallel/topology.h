// Which ranks share a node, and how many cores each may use.
#pragma once

#include <chrono>
#include <string>
#include <vector>

namespace certkv {

class Communicator;

std::string host_name();  // short name, at most 63 characters

// What makes two processes be on the same node: CERTKV_NODE where it is set (so that several nodes
// can be played on one host), else host name and boot id. It decides which store a rank uses.
std::string node_identity();

// Cores this process may run on: its affinity mask, and its control group's quota if smaller.
// ENSURES result >= 1
int usable_cores();

struct Topology {
  int node = 0;         // of this rank; nodes are numbered in the order of their first ranks
  int nodes = 1;
  int local_rank = 0;   // among the ranks of this node, in rank order
  int local_size = 1;
  int threads = 1;      // that this rank may start so that all ranks of the host share its cores
  std::vector<int> node_of_rank;        // [size]
  std::vector<std::string> node_names;  // [nodes] host names, or CERTKV_NODE
  bool first_local_rank() const { return local_rank == 0; }
};

// Collective over the group.
Topology gather_topology(Communicator& group, std::chrono::milliseconds silence);

// Cores of one rank when each core is shared equally by the ranks whose masks hold it. At least 1.
// masks: [ranks of one host], each a list of cores; place: of this rank in masks; quota: cores of
// the control group, 0 unlimited
int fair_threads(const std::vector<std::vector<int>>& masks, int place, int quota);

}  // namespace certkv
