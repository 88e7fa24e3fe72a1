import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ArrayNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import com.google.protobuf.ByteString;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.math.BigInteger;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Base64;
import java.util.List;
import software.amazon.kinesis.retrieval.AggregatorUtil;
import software.amazon.kinesis.retrieval.KinesisClientRecord;
import software.amazon.kinesis.retrieval.kpl.Messages;

/**
 * One JSON request per line of stdin, one answer per line of stdout.
 *
 * <p>{"deaggregate": base64, "start": "0", "end": "..."} is answered with what the KCL's AggregatorUtil makes of a record
 * that holds these bytes; start and end are the shard's hash key range. {"message": {...}} is answered with the
 * AggregatedRecord as protobuf-java writes it.
 */
public final class Kcl {
    private static final ObjectMapper JSON = new ObjectMapper();

    public static void main(String[] args) throws Exception {
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        PrintStream out = new PrintStream(System.out, true, "UTF-8");
        for (String line = in.readLine(); line != null; line = in.readLine()) {
            JsonNode request = JSON.readTree(line);
            ObjectNode answer = JSON.createObjectNode();
            try {
                if (request.has("deaggregate")) {
                    deaggregate(request, answer);
                } else {
                    write(request.get("message"), answer);
                }
            } catch (Throwable e) { // an Error too is an answer: it is what a KCL application would die of
                answer.put("raised", e.toString());
            }
            out.println(JSON.writeValueAsString(answer));
        }
    }

    private static void deaggregate(JsonNode request, ObjectNode answer) {
        byte[] data = Base64.getDecoder().decode(request.get("deaggregate").asText());
        KinesisClientRecord record = KinesisClientRecord.builder()
                .data(ByteBuffer.wrap(data))
                .partitionKey("outer")
                .sequenceNumber("4956")
                .build();
        List<KinesisClientRecord> records = new ArrayList<>();
        records.add(record);
        List<KinesisClientRecord> result = request.has("start")
                ? new AggregatorUtil()
                        .deaggregate(
                                records,
                                new BigInteger(request.get("start").asText()),
                                new BigInteger(request.get("end").asText()))
                : new AggregatorUtil().deaggregate(records);
        ArrayNode list = answer.putArray("records");
        for (KinesisClientRecord r : result) {
            byte[] bytes = new byte[r.data().remaining()];
            r.data().get(bytes);
            list.addObject()
                    .put("aggregated", r.aggregated())
                    .put("partition_key", r.partitionKey())
                    .put("explicit_hash_key", r.explicitHashKey())
                    .put("sub_sequence_number", r.subSequenceNumber())
                    .put("data", Base64.getEncoder().encodeToString(bytes));
        }
    }

    private static void write(JsonNode message, ObjectNode answer) {
        Messages.AggregatedRecord.Builder builder = Messages.AggregatedRecord.newBuilder();
        message.get("partition_key_table").forEach(key -> builder.addPartitionKeyTable(key.asText()));
        message.get("explicit_hash_key_table").forEach(key -> builder.addExplicitHashKeyTable(key.asText()));
        for (JsonNode r : message.get("records")) {
            Messages.Record.Builder record = Messages.Record.newBuilder()
                    .setPartitionKeyIndex(r.get(0).asLong())
                    .setData(ByteString.copyFrom(Base64.getDecoder().decode(r.get(2).asText())));
            if (!r.get(1).isNull()) {
                record.setExplicitHashKeyIndex(r.get(1).asLong());
            }
            builder.addRecords(record);
        }
        answer.put("bytes", Base64.getEncoder().encodeToString(builder.build().toByteArray()));
    }
}
