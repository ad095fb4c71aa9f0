// CUDA implementations of push_rows_, put_signals_ and await_signals_ (moetrain/ops/peer_memory.py).
#include <string>
#include <vector>

#include "peer_memory.cuh"
#include "tensors.cuh"

namespace moetrain {

static int count_peers(size_t peers, size_t others) {
  STD_TORCH_CHECK(peers > 0 && peers <= size_t(kMaxPeers) && peers == others,
                  "one to 64 positions, and as many numbers");
  return int(peers);
}

static void push_rows(const Tensor& rows_in, std::vector<Tensor> areas, std::vector<int64_t> sent,
                      std::vector<int64_t> there, int64_t first) {
  const DeviceScope scope(rows_in);
  const Tensor rows = dense(rows_in);
  expect(rows, ScalarType::Byte, 2, "rows");
  const int peers = count_peers(areas.size(), sent.size());
  STD_TORCH_CHECK(there.size() == sent.size() && first >= 0, "push_rows: a place for every position");
  uint8_t* targets[kMaxPeers];
  int64_t total = 0;
  for (int peer = 0; peer < peers; peer++) {
    expect(areas[peer], ScalarType::Byte, 1, "areas");
    STD_TORCH_CHECK(sent[peer] >= 0 && there[peer] >= 0 &&
                        (there[peer] + sent[peer]) * rows.size(1) <= areas[peer].numel(),
                    "push_rows: rows that find no room");
    targets[peer] = out<uint8_t>(areas[peer]);
    total += sent[peer];
  }
  STD_TORCH_CHECK(total == rows.size(0), "push_rows: as many rows as are sent");
  launch_push(rows.const_data_ptr(), targets, sent.data(), there.data(), peers, int(first % peers),
              rows.size(1), scope.stream);
  check_launch();
}

static void put_signals(std::vector<Tensor> pads, int64_t place, int64_t epoch) {
  const int peers = count_peers(pads.size(), pads.size());
  const DeviceScope scope(pads[0]);
  int64_t* targets[kMaxPeers];
  for (int peer = 0; peer < peers; peer++) {
    expect(pads[peer], ScalarType::Long, 1, "pads");
    STD_TORCH_CHECK(place >= 0 && place < pads[peer].numel(), "put_signals: no such place");
    targets[peer] = out<int64_t>(pads[peer]);
  }
  launch_put(targets, place, epoch, peers, scope.stream);
  check_launch();
}

static void await_signals(const Tensor& pad, std::vector<int64_t> places, int64_t epoch, int64_t limit_ms,
                          std::vector<int64_t> ranks, std::string what) {
  const DeviceScope scope(pad);
  expect(pad, ScalarType::Long, 1, "pad");
  const int peers = count_peers(places.size(), ranks.size() - 1);
  WaitFor waits{};
  for (int peer = 0; peer < peers; peer++) {
    STD_TORCH_CHECK(places[peer] >= 0 && places[peer] < pad.numel(), "await_signals: no such place");
    waits.place[peer] = int32_t(places[peer]);
    waits.rank[peer] = int32_t(ranks[peer]);
  }
  waits.rank[peers] = int32_t(ranks[peers]);
  what.copy(waits.what, sizeof(waits.what) - 1);
  launch_wait(in<int64_t>(pad), waits, peers, epoch, limit_ms, scope.stream);
  check_launch();
}

REGISTER(library) {
  library.impl("push_rows_", TORCH_BOX(&push_rows));
  library.impl("put_signals_", TORCH_BOX(&put_signals));
  library.impl("await_signals_", TORCH_BOX(&await_signals));
}

}  // namespace moetrain
