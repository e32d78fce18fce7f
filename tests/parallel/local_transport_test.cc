#include "parallel/local_transport.h"

#include "tests/support/transport_contract.h"

namespace certkv::test {
namespace {

class LocalServer : public ContractServer {
 public:
  LocalServer(std::shared_ptr<LocalNetwork> network, const JobKey& key,
              const TransportOptions& options)
      : network_(std::move(network)),
        transport_(network_->make(key, options, contract_handler(stop_))) {}
  ~LocalServer() override { *stop_ = true; }
  std::string address() const override { return transport_->address(); }
  void kill() override { network_->kill(address()); }
  void pause() override { network_->pause(address()); }
  void resume() override { network_->resume(address()); }

 private:
  std::shared_ptr<std::atomic<bool>> stop_ = std::make_shared<std::atomic<bool>>(false);
  std::shared_ptr<LocalNetwork> network_;
  std::unique_ptr<Transport> transport_;
};

struct LocalWorld : TransportKind::World {
  std::unique_ptr<Transport> client(const TransportOptions& options, bool wrong_key) override {
    return network->make(wrong_key ? JobKey::generate() : key, options, contract_handler());
  }
  std::unique_ptr<ContractServer> server() override {
    TransportOptions options = contract_options();
    options.listen = "local:0";
    return std::make_unique<LocalServer>(network, key, options);
  }
  JobKey key = JobKey::generate();
  std::shared_ptr<LocalNetwork> network = LocalNetwork::create();
};

INSTANTIATE_TEST_SUITE_P(Local, TransportContract,
                         testing::Values(TransportKind{
                             "Local", []() -> std::unique_ptr<TransportKind::World> {
                               return std::make_unique<LocalWorld>();
                             }}));

}  // namespace
}  // namespace certkv::test
