// SPDX-License-Identifier: Apache-2.0
// Attention of a whole batch: the work of `attend.hpp` dealt out to threads in equal shares.
#pragma once

#include <atomic>
#include <optional>
#include <vector>

#include "attend.hpp"
#include "threads.hpp"

namespace heterospec {

// Below this many multiply-adds a thread's share costs less than waking the thread.
constexpr int64_t kWorthAThread = 1 << 17;

// A point in the list of all (request, KV head) items, each cut into chunks of keys.
struct Mark {
  int64_t item, chunk;
};

class Plan {
 public:
  Plan(const Arguments& args, int max_threads) : args_(args) {
    int64_t total = 0, largest = 0;
    for (int64_t req = 0; req < args.num_reqs; ++req) {
      total += item_cost(req) * args.num_kv_heads;
      largest = std::max(largest, rows(req));
    }
    const bool parallel = total * args.head_size > kWorthAThread;
    marks_.assign(parallel ? max_threads + 1 : 2, Mark{num_items(), 0});
    slot_floats_ = Partial::floats(largest, args.head_size);
    place_marks(total);
  }

  int threads() const { return int(marks_.size()) - 1; }
  int64_t num_items() const { return args_.num_reqs * args_.num_kv_heads; }
  int64_t slot_floats() const { return slot_floats_; }

  int64_t chunks(int64_t item) const {
    const int64_t req = item / args_.num_kv_heads;
    return rows(req) == 0 ? 0 : (args_.seq_lens[req] + kChunk - 1) / kChunk;
  }

  int64_t first_item(int thread) const { return marks_[thread].item; }
  int64_t last_item(int thread) const {  // inclusive
    return std::min(marks_[thread + 1].item, num_items() - 1);
  }
  // The chunks [begin, end) of `item` that are `thread`'s.
  void share(int thread, int64_t item, int64_t& begin, int64_t& end) const {
    const Mark &from = marks_[thread], &to = marks_[thread + 1];
    begin = item == from.item ? from.chunk : (item < from.item ? chunks(item) : 0);
    end = item == to.item ? to.chunk : (item < to.item ? chunks(item) : 0);
  }

 private:
  int64_t rows(int64_t req) const {
    return (args_.query_start_loc[req + 1] - args_.query_start_loc[req]) *
           (args_.num_heads / args_.num_kv_heads);
  }
  // Reading a key costs about as much as multiplying it with this many rows.
  static constexpr int64_t kReadRows = 6;
  int64_t key_cost(int64_t req) const { return rows(req) == 0 ? 0 : rows(req) + kReadRows; }
  int64_t item_cost(int64_t req) const {
    const int64_t keys = (args_.seq_lens[req] + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
    return key_cost(req) * keys;
  }

  // Equal shares of the total, each boundary at the nearest end of a chunk.
  void place_marks(int64_t total) {
    marks_[0] = Mark{0, 0};
    const int n = threads();
    int64_t before = 0;
    int next = 1;
    for (int64_t item = 0; item < num_items() && next < n; ++item) {
      const int64_t req = item / args_.num_kv_heads, cost = item_cost(req);
      const int64_t per_chunk = key_cost(req) * kChunk;
      for (; next < n && total * next / n < before + cost; ++next) {
        const int64_t chunk = (total * next / n - before + per_chunk / 2) / per_chunk;
        marks_[next] = chunk < chunks(item) ? Mark{item, chunk} : Mark{item + 1, 0};
      }
      before += cost;
    }
  }

  const Arguments& args_;
  std::vector<Mark> marks_;
  int64_t slot_floats_ = 0;
};

// What threads leave for each other where a boundary cuts an item: at most two partial results a
// thread, and per item the number of chunks done, so that whoever finishes last merges.
struct Shared {
  std::vector<std::atomic<int64_t>> done;
  Buffer<float> memory;
  float* slots = nullptr;

  void prepare(const Plan& plan) {
    if (done.size() < size_t(plan.num_items()))
      done = std::vector<std::atomic<int64_t>>(plan.num_items());
    for (int64_t i = 0; i < plan.num_items(); ++i) done[i].store(0, std::memory_order_relaxed);
    slots = memory.at_least(2 * plan.threads() * plan.slot_floats());
  }
};

template <typename T, typename Pages, typename L>
void finish_shared(const Plan& plan, Shared& shared, Attend<T, Pages, L>& attend, int thread,
                   int64_t item, int64_t begin, int64_t end) {
  const auto slot = [&](int owner, bool from_start) {
    return shared.slots + (2 * owner + from_start) * plan.slot_floats();
  };
  const int64_t chunks = plan.chunks(item);
  attend.save(slot(thread, begin == 0));
  const int64_t done = shared.done[item].fetch_add(end - begin, std::memory_order_acq_rel);
  if (done + end - begin < chunks) return;
  for (int other = 0; other < plan.threads(); ++other) {
    int64_t from, to;
    plan.share(other, item, from, to);
    if (other != thread && from < to) attend.merge(slot(other, from == 0));
  }
  attend.write_output();
}

template <typename T, typename Pages, typename L>
void work(const Arguments& args, const Plan& plan, Shared& shared, int thread) {
  Attend<T, Pages, L> attend(args);
#if defined(HETEROSPEC_AMX)
  std::optional<Tiles> tiles;
  if (kInTiles<L, Pages> && Tiles::permitted()) tiles.emplace();
#endif
  for (int64_t item = plan.first_item(thread); item <= plan.last_item(thread); ++item) {
    int64_t begin, end;
    plan.share(thread, item, begin, end);
    if (begin >= end) continue;
    attend.run(item / args.num_kv_heads, item % args.num_kv_heads, begin, end);
    if (end - begin == plan.chunks(item))
      attend.write_output();
    else
      finish_shared(plan, shared, attend, thread, item, begin, end);
  }
}

template <typename T, typename Pages, typename L>
void run(const Arguments& args) {
  const Plan plan(args, args.num_threads > 0 ? int(args.num_threads) : max_threads());
  static thread_local Shared memory;
  Shared& shared = memory;
  shared.prepare(plan);
  if (plan.threads() == 1) return work<T, Pages, L>(args, plan, shared, 0);
#pragma omp parallel num_threads(plan.threads())
  {
    // A runtime may grant fewer threads than asked for: the shares are then dealt out in turn.
    for (int t = team_member(); t < plan.threads(); t += team_size())
      work<T, Pages, L>(args, plan, shared, t);
  }
}

}  // namespace heterospec
