import java.io.PrintStream;
import java.net.URI;
import java.nio.charset.StandardCharsets;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicInteger;
import software.amazon.awssdk.auth.credentials.AwsBasicCredentials;
import software.amazon.awssdk.auth.credentials.StaticCredentialsProvider;
import software.amazon.awssdk.http.Protocol;
import software.amazon.awssdk.http.nio.netty.NettyNioAsyncHttpClient;
import software.amazon.awssdk.regions.Region;
import software.amazon.awssdk.services.cloudwatch.CloudWatchAsyncClient;
import software.amazon.awssdk.services.dynamodb.DynamoDbAsyncClient;
import software.amazon.awssdk.services.kinesis.KinesisAsyncClient;
import software.amazon.kinesis.common.ConfigsBuilder;
import software.amazon.kinesis.common.InitialPositionInStream;
import software.amazon.kinesis.common.InitialPositionInStreamExtended;
import software.amazon.kinesis.coordinator.CoordinatorConfig.ClientVersionConfig;
import software.amazon.kinesis.coordinator.Scheduler;
import software.amazon.kinesis.lifecycle.events.InitializationInput;
import software.amazon.kinesis.lifecycle.events.LeaseLostInput;
import software.amazon.kinesis.lifecycle.events.ProcessRecordsInput;
import software.amazon.kinesis.lifecycle.events.ShardEndedInput;
import software.amazon.kinesis.lifecycle.events.ShutdownRequestedInput;
import software.amazon.kinesis.metrics.NullMetricsFactory;
import software.amazon.kinesis.processor.ShardRecordProcessor;
import software.amazon.kinesis.processor.SingleStreamTracker;
import software.amazon.kinesis.retrieval.KinesisClientRecord;
import software.amazon.kinesis.retrieval.polling.PollingConfig;

/**
 * A KCL application: prints what it reads, and checkpoints every record.
 *
 * <p>Arguments: the endpoints of Kinesis and of DynamoDB, the stream, the application's name (its lease table's), the
 * client version of the KCL's configuration, and how many records to read before it stops; then it prints "stopped". It
 * also stops when its input ends, so that it does not outlive a test. A record is "record SHARD SEQUENCE SUB DATA".
 */
public final class KclApplication {
    private static final PrintStream OUT = new PrintStream(System.out, true, StandardCharsets.UTF_8);
    private static final CountDownLatch DONE = new CountDownLatch(1);
    private static AtomicInteger left;

    public static void main(String[] args) throws Exception {
        String stream = args[2];
        left = new AtomicInteger(Integer.parseInt(args[5]));
        StaticCredentialsProvider nobody = StaticCredentialsProvider.create(AwsBasicCredentials.create("test", "test"));
        KinesisAsyncClient kinesis = KinesisAsyncClient.builder()
                .endpointOverride(URI.create(args[0]))
                .region(Region.US_EAST_1)
                .credentialsProvider(nobody)
                .httpClientBuilder(NettyNioAsyncHttpClient.builder().protocol(Protocol.HTTP1_1))
                .build();
        DynamoDbAsyncClient dynamodb = DynamoDbAsyncClient.builder()
                .endpointOverride(URI.create(args[1]))
                .region(Region.US_EAST_1)
                .credentialsProvider(nobody)
                .build();
        CloudWatchAsyncClient cloudwatch = CloudWatchAsyncClient.builder() // never called: there are no metrics
                .region(Region.US_EAST_1)
                .credentialsProvider(nobody)
                .build();
        ConfigsBuilder configs = new ConfigsBuilder(
                new SingleStreamTracker(
                        stream,
                        InitialPositionInStreamExtended.newInitialPosition(InitialPositionInStream.TRIM_HORIZON)),
                args[3],
                kinesis,
                dynamodb,
                cloudwatch,
                "worker-" + ProcessHandle.current().pid(),
                Processor::new);
        var leases = configs.leaseManagementConfig().failoverTimeMillis(2000).shardSyncIntervalMillis(1000);
        leases.workerUtilizationAwareAssignmentConfig().disableWorkerMetrics(true);
        Scheduler scheduler = new Scheduler(
                configs.checkpointConfig(),
                configs.coordinatorConfig()
                        .clientVersionConfig(ClientVersionConfig.valueOf(args[4]))
                        .parentShardPollIntervalMillis(200)
                        .shardConsumerDispatchPollIntervalMillis(100),
                leases,
                configs.lifecycleConfig(),
                configs.metricsConfig().metricsFactory(new NullMetricsFactory()),
                configs.processorConfig(),
                configs.retrievalConfig()
                        .retrievalSpecificConfig(
                                new PollingConfig(stream, kinesis).maxRecords(3).idleTimeBetweenReadsInMillis(250)));
        Thread thread = new Thread(scheduler, "scheduler");
        thread.setDaemon(true);
        thread.start();
        Thread watch = new Thread(KclApplication::waitForTheEndOfInput, "input");
        watch.setDaemon(true);
        watch.start();
        DONE.await();
        // Its leases keep their owner, but it gives up being the leader: the next one would wait two minutes for that.
        scheduler.shutdown();
        thread.join(30_000);
        OUT.println("stopped");
        System.exit(0);
    }

    private static void waitForTheEndOfInput() {
        try {
            while (System.in.read() >= 0) {}
        } catch (java.io.IOException e) {
            // the same
        }
        DONE.countDown();
    }

    private static final class Processor implements ShardRecordProcessor {
        private String shardId;

        @Override
        public void initialize(InitializationInput input) {
            shardId = input.shardId();
        }

        @Override
        public void processRecords(ProcessRecordsInput input) {
            for (KinesisClientRecord record : input.records()) {
                synchronized (KclApplication.class) { // so that what is printed is checkpointed, when it stops
                    if (left.get() == 0) {
                        return;
                    }
                    byte[] data = new byte[record.data().remaining()];
                    record.data().get(data);
                    String text = new String(data, StandardCharsets.UTF_8);
                    try {
                        input.checkpointer().checkpoint(record.sequenceNumber(), record.subSequenceNumber());
                    } catch (Exception e) {
                        throw new IllegalStateException(e);
                    }
                    OUT.println("record " + shardId + " " + record.sequenceNumber() + " "
                            + record.subSequenceNumber() + " " + text);
                    if (left.decrementAndGet() == 0) {
                        DONE.countDown();
                    }
                }
            }
        }

        @Override
        public void leaseLost(LeaseLostInput input) {}

        @Override
        public void shardEnded(ShardEndedInput input) {
            try {
                input.checkpointer().checkpoint();
            } catch (Exception e) {
                throw new IllegalStateException(e);
            }
            OUT.println("ended " + shardId);
        }

        @Override
        public void shutdownRequested(ShutdownRequestedInput input) {}
    }
}
